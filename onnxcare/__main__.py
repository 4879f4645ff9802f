"""`python -m onnxcare`."""

from onnxcare.cli import main

main()
