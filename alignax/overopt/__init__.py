"""The overoptimisation laboratory: gold reward against proxy over sqrt(KL), measured, fitted and reported."""
