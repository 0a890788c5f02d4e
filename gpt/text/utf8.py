"""Text as bytes of a Unicode encoding, and what to do about a text that has none."""

from gpt.errors import UserError


def encoded(text: str, encoding: str, errors: str = "strict", start: int = 0) -> bytes:
    """`text`, which begins at position `start` of a longer one, in a Unicode `encoding`, which lone surrogates do not
    have."""
    try:
        return text.encode(encoding, errors)
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = f"byte 0x{code - 0xDC00:02X}" if 0xDC80 <= code <= 0xDCFF else f"lone surrogate U+{code:04X}"
        raise UserError(
            f"the text is not UTF-8, for it has the {what} at position {start + error.start}: convert it to UTF-8, "
            "or train a model with --tokenizer byte, which takes any bytes"
        ) from error
