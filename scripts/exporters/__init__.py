"""One small backdoored model of digits for every exporter; `make_exporters.py` runs the modules."""
