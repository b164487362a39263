"""A student against another on questions of one's own, AlpacaEval or MT-Bench."""
