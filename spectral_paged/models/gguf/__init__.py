"""Reading, checking and conversion of model files in GGUF, key by key and tensor by tensor.

`file` reads the container, and `keys` records the keys that were used. `architectures` and `rope`
turn keys into a transformers config. `vocabulary`, `pre_tokenizers` and `tokenizer` build the
tokenizer. `weights` writes safetensors, and `conversion` writes the folder of all of them.
"""

from spectral_paged.models.gguf.conversion import convert_gguf
from spectral_paged.models.gguf.file import GGUFFile

__all__ = ["GGUFFile", "convert_gguf"]
