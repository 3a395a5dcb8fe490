"""A SentencePiece model of any size, for checkpoints whose weights are random."""

import itertools
import string

CONTROL, UNKNOWN, USER_DEFINED, BYTE = 3, 2, 4, 6


def made_tokenizer(vocab: int) -> bytes:
    """A BPE model with that many pieces: those of Nemotron's chat, all bytes if there is room, then made-up words."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()

    def add(piece: str, kind: int = 1, score: float = 0.0) -> None:
        proto.pieces.add(piece=piece, type=kind, score=score)

    add("<pad>", CONTROL)
    add("<unk>", UNKNOWN)
    add("<s>", CONTROL)
    add("</s>", CONTROL)
    for piece in ("<extra_id_0>", "<extra_id_1>", "\n"):
        add(piece, USER_DEFINED)
    has_bytes = vocab >= 512
    if has_bytes:
        for byte in range(256):
            add(f"<0x{byte:02X}>", BYTE)
    letters = "▁" + string.ascii_letters + string.digits + string.punctuation
    words = itertools.chain.from_iterable(
        map("".join, itertools.product(letters, repeat=length)) for length in itertools.count(1))
    for word in itertools.islice(words, vocab - len(proto.pieces)):
        add(word, score=float(-len(proto.pieces)))
    trainer = proto.trainer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = 2, vocab, has_bytes
    trainer.pad_id, trainer.unk_id, trainer.bos_id, trainer.eos_id = 0, 1, 2, 3
    normalizer = proto.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return proto.SerializeToString()
