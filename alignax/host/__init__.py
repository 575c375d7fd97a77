"""The functions of an experiment that run on the host: which there are, and the processes that call them."""
