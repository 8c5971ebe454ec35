"""Rules by which byte-level vocabularies cut text into words, by their names in GGUF files.

A file names its rule in `tokenizer.ggml.pre`. The expressions are those of the models' own
tokenizers. Each expression cuts the pieces that the one before it left. A match is a piece, and so
is the text between two matches.
"""

from __future__ import annotations

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
MARKS_AND_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|{WORD}|\p{{N}}{{1,3}}|{MARKS}|{BLANKS}"
QWEN2 = rf"{CONTRACTIONS}|{WORD}|\p{{N}}|{MARKS}|{BLANKS}"
QWEN35 = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{BLANKS}"
)
GPT4O = (
    rf"{CASED[0]}{CONTRACTIONS}?|{CASED[1]}{CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{MARKS_AND_SLASH}|{BLANKS}"
)
TEKKEN = rf"{CASED[0]}|{CASED[1]}|\p{{N}}|{MARKS_AND_SLASH}|{BLANKS}"
SEED_CODER = (
    rf"{CONTRACTIONS}|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{BLANKS}"  # marks take no newline
)
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + BLANKS,
)
DEEPSEEK_CODER = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    "[一-龥\u0800-一가-\ud7ff]+",
    r"\p{N}",
)
FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")
UNNAMED = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")

LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "lfm2")
_RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("default", UNNAMED),
    ("gpt-2 phi-2 mpt olmo jais trillion exaone4 mellum a.x-4.0 gigachat", (GPT2,)),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", (r"\p{N}", GPT2)),
    (" ".join(LLAMA3_NAMES), (LLAMA3,)),
    ("dbrx smaug-bpe glm4 chatglm-bpe", (LLAMA3,)),
    ("qwen2 deepseek-r1-qwen kormo stablelm2 megrez hunyuan solar-open grok-2", (QWEN2,)),
    ("qwen35", (QWEN35,)),
    ("gpt-4o llama4 kanana2", (GPT4O,)),
    ("tekken", (TEKKEN,)),
    ("seed-coder", (SEED_CODER,)),
    ("deepseek-v3 hunyuan-dense joyai-llm", DEEPSEEK_V3),
    ("deepseek-coder", DEEPSEEK_CODER),
    ("falcon", FALCON),
)
PRE_TOKENIZERS = {name: rules for names, rules in _RULES for name in names.split()}
ADDS_BOS = {*LLAMA3_NAMES, "tekken"}  # rules with which BOS begins a text by default
WHOLE_WORDS = ADDS_BOS  # rules with which a word that is a token is not merged from its parts
