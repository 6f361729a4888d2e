"""`python -m onnx_lwdf` is the command line."""

from onnx_lwdf.cli import main

if __name__ == "__main__":
    main()
