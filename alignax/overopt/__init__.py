"""The overoptimisation laboratory: it measures, fits and reports gold reward and proxy reward over sqrt(KL)."""
