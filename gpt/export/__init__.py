"""Models for other programs: `python -m gpt.export` writes a folder for Hugging Face's transformers (huggingface.py),
or a file for ONNX Runtime and its like (onnx.py). Nothing is read back here.
"""
