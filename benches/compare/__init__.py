"""Side-by-side measurements of zeo-rs and its peers; `scripts/bench` runs them, `docs/benchmarking.md` explains them."""
