"""Model files in GGUF: read, checked key by key and tensor by tensor, and converted.

`file` reads what the format says, `keys` keeps account of what was used, `architectures` and `rope`
turn keys into a transformers config, `vocabulary`, `pre_tokenizers` and `tokenizer` build the
tokenizer, `weights` writes safetensors, and `conversion` puts it all into a folder.
"""

from spectral_paged.models.gguf.conversion import convert_gguf
from spectral_paged.models.gguf.file import GGUFFile

__all__ = ["GGUFFile", "convert_gguf"]
