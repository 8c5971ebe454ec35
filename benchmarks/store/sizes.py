"""The sizes of `bench store`: model, prompts, conversations, documents and memory."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a suite measures; bytes of `kv_cache_bytes` and so on are those of an `LLM`.

    Attributes:
        prefill_segment, max_num_batched_tokens: of every engine.
        lengths: tokens of a prompt whose first token is timed, and how many such prompts.
        prompts_cache_bytes: the pool of those prompts; it holds the longest.
        prompts_host_bytes: host memory of those prompts; it holds all of them.
        kv_cache_bytes: the pool of conversations; it holds as many as there are seats.
        num_conversations, first_len, turn_len, num_turns: each conversation begins with `first_len`
            tokens, and every later turn adds `turn_len`.
        conversation_bytes: host memory for each conversation.
        seats: conversations at once.
        num_documents, document_len, num_questions, question_len: every document is asked so often.
        documents_seats, documents_cache_bytes, documents_host_bytes: documents at once, their pool,
            which holds few of them, and host memory, which holds all.
        answer_len: tokens of an answer.
        num_others, other_len, other_answer_len: requests that have nothing in common.
        others_cache_bytes, others_host_bytes: the pool and host memory of those.
        disk_bytes: `kv_store_size`.
        probe_bytes: written and read to measure the disk.
    """

    model: str
    prefill_segment: int
    max_num_batched_tokens: int
    lengths: dict[int, int]
    prompts_cache_bytes: int
    prompts_host_bytes: int
    kv_cache_bytes: int
    num_conversations: int
    first_len: int
    turn_len: int
    num_turns: int
    conversation_bytes: int
    seats: int
    num_documents: int
    document_len: int
    num_questions: int
    question_len: int
    documents_seats: int
    documents_cache_bytes: int
    documents_host_bytes: int
    answer_len: int
    num_others: int
    other_len: int
    other_answer_len: int
    others_cache_bytes: int
    others_host_bytes: int
    disk_bytes: int
    probe_bytes: int


SUITES = {
    # for one H200
    "8b": Sizes(
        model="random:llama-3-8b",
        prefill_segment=2048,
        kv_cache_bytes=10 * GIB,  # twenty conversations
        max_num_batched_tokens=8192,
        lengths={8192: 3, 32_768: 3, 131_008: 2},
        prompts_cache_bytes=16 * GIB,
        prompts_host_bytes=16 * GIB,
        num_conversations=48,
        first_len=8192,
        turn_len=256,
        num_turns=4,
        conversation_bytes=384 << 20,
        seats=20,
        num_documents=12,
        document_len=32_768,
        num_questions=3,
        question_len=256,
        documents_seats=4,
        documents_cache_bytes=6 * GIB,
        documents_host_bytes=16 * GIB,
        answer_len=32,
        num_others=64,
        other_len=4096,
        other_answer_len=128,
        others_cache_bytes=24 * GIB,
        others_host_bytes=16 * GIB,
        disk_bytes=32 * GIB,
        probe_bytes=2 * GIB,
    ),
    # for a CPU, in seconds; its times say nothing of a model that is used
    "tiny": Sizes(
        model="random:tiny",
        prefill_segment=512,
        kv_cache_bytes=5 << 20,
        max_num_batched_tokens=2048,
        lengths={1300: 2, 2400: 2},
        prompts_cache_bytes=8 << 20,
        prompts_host_bytes=24 << 20,
        num_conversations=4,
        first_len=1200,
        turn_len=40,
        num_turns=3,
        conversation_bytes=2 << 20,
        seats=2,
        num_documents=3,
        document_len=1300,
        num_questions=2,
        question_len=30,
        documents_seats=2,
        documents_cache_bytes=5 << 20,
        documents_host_bytes=16 << 20,
        answer_len=3,
        num_others=3,
        other_len=1200,
        other_answer_len=12,
        others_cache_bytes=8 << 20,
        others_host_bytes=8 << 20,
        disk_bytes=64 << 20,
        probe_bytes=1 << 20,
    ),
}
