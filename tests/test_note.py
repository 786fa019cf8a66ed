"""Signed notes, their keys, and checkpoints: other people's are read, and what is not exactly one is refused."""

from __future__ import annotations

import sys
from base64 import b64encode
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_properties import PROFILE
from tests.trees import leaves, naive_root, vectors
from tracevault import ConfigError, ProofError
from tracevault.integrity.checkpoint import Checkpoint, cosignature_time
from tracevault.integrity.merkle import EMPTY_ROOT
from tracevault.integrity.note import COSIGNATURE_V1, ED25519, Note, Signature, Signer, Verifier

PURE = settings(max_examples=100, **PROFILE)
VALID = vectors("signed_notes")["valid"]
EXAMPLE = vectors("tracevault_example_bundle")
LOG = Signer("log.example/a", bytes(range(32)))
WITNESS = Signer("witness.example/w", bytes(range(1, 33)), COSIGNATURE_V1)
TEXT = str(Checkpoint("log.example/a", 3, b"\x07" * 32))
SIGNED = str(Note(TEXT, [LOG.sign(TEXT)]))
LINE = str(LOG.sign(TEXT))


# Other people's notes


@pytest.mark.parametrize("case", VALID, ids=[case["name"] for case in VALID])
def test_a_note_of_others_is_read_verified_and_written_as_it_was(case: dict[str, str]) -> None:
    verifier, note = Verifier.parse(case["vkey"]), Note.parse(case["note"])
    assert note.verified_by([verifier]) == [verifier]
    assert (str(verifier), str(note)) == (case["vkey"], case["note"])


def test_a_key_of_go_signs_as_go_does() -> None:
    (case,) = [case for case in VALID if "skey" in case]
    signer = Signer.parse(case["skey"])
    assert signer.encode() == case["skey"]
    assert str(signer.verifier) == case["vkey"]
    text = Note.parse(case["note"]).text
    assert str(Note(text, [signer.sign(text)])) == case["note"]


def test_the_checkpoints_of_the_example_log_are_ours() -> None:
    hashes = leaves(700)
    keys = [Verifier.parse(EXAMPLE["vkey"]), Verifier.parse(EXAMPLE["cosig_vkey"])]
    assert [key.algorithm for key in keys] == [ED25519, COSIGNATURE_V1]
    for stored in EXAMPLE["checkpoints"]:
        note = Note.parse(stored)
        assert note.verified_by(keys) == keys
        assert str(note) == stored
        checkpoint = Checkpoint.parse(note.text)
        assert checkpoint == Checkpoint(EXAMPLE["origin"], checkpoint.size, naive_root(hashes[: checkpoint.size]))
        assert str(checkpoint) == note.text
        assert cosignature_time(note.signatures[1]) == 1_700_000_000 + checkpoint.size
        with pytest.raises(ProofError, match="no cosignature"):
            cosignature_time(note.signatures[0])


# Verifying


@PURE
@given(st.data())
def test_no_byte_of_a_signed_note_can_be_changed(data: st.DataObject) -> None:
    cosigned = Note.parse(SIGNED).with_signatures([WITNESS.sign(TEXT, time=1_700_000_000)])
    encoded = bytearray(str(cosigned).encode())
    place = data.draw(st.integers(0, len(encoded) - 1))
    encoded[place] ^= data.draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128]))
    keys = [LOG.verifier, WITNESS.verifier]
    with suppress(ProofError):
        assert Note.parse(encoded.decode("utf-8", "surrogateescape")).verified_by(keys) != keys


def test_unknown_keys_are_passed_over_and_a_known_one_with_a_wrong_signature_is_not() -> None:
    other = Signer("log.example/b", bytes(32))
    same_name = Signer(LOG.name, bytes(32))
    note = Note(TEXT, [other.sign(TEXT), same_name.sign(TEXT), LOG.sign(TEXT)])
    assert note.verified_by([LOG.verifier]) == [LOG.verifier]
    assert note.verified_by([]) == Note.parse(SIGNED).verified_by([other.verifier]) == []
    wrong = Note(TEXT, [LOG.sign(TEXT), LOG.sign("another text\n")])
    with pytest.raises(ProofError, match=r"signature of log\.example/a is wrong"):
        wrong.verified_by([LOG.verifier])


@given(st.binary(max_size=80))
def test_any_other_bytes_are_no_signature(value: bytes) -> None:
    assert not LOG.verifier.verify(TEXT, value)
    assert not WITNESS.verifier.verify(TEXT, value)


@given(st.binary(min_size=32, max_size=32))
def test_any_bytes_as_a_key_verify_nothing_and_raise_nothing(key: bytes) -> None:
    assert not Verifier("log.example/a", ED25519, key).verify(TEXT, LOG.sign("another text\n").value)


def test_the_time_of_a_cosignature_is_signed() -> None:
    value = WITNESS.sign(TEXT, time=1_700_000_000).value
    assert WITNESS.verifier.verify(TEXT, value)
    assert not WITNESS.verifier.verify(TEXT, (1_700_000_001).to_bytes(8) + value[8:])
    assert not WITNESS.verifier.verify(TEXT, b"\xff" + value[1:])
    with pytest.raises(ProofError, match="beyond"):
        cosignature_time(Signature("w", bytes(4), b"\xff" + value[1:]))


@pytest.mark.parametrize(("signer", "time"), [(LOG, 5), (WITNESS, None), (WITNESS, -1), (WITNESS, 2**63)])
def test_a_time_is_for_cosignatures_alone(signer: Signer, time: int | None) -> None:
    with pytest.raises(ConfigError, match="time"):
        signer.sign(TEXT, time=time)


def test_a_newer_signature_of_a_key_replaces_the_older() -> None:
    note = (
        Note.parse(SIGNED).with_signatures([WITNESS.sign(TEXT, time=1)]).with_signatures([WITNESS.sign(TEXT, time=2)])
    )
    assert [signature.name for signature in note.signatures] == [LOG.name, WITNESS.name]
    assert cosignature_time(note.signatures[1]) == 2


def test_two_keys_that_cannot_be_told_apart_are_not_both_asked_for() -> None:
    class Twin(Verifier):
        @property
        def key_id(self) -> bytes:
            return LOG.verifier.key_id

    twin = Twin(LOG.name, ED25519, bytes(32))
    with pytest.raises(ProofError, match="one key id"):
        Note.parse(SIGNED).verified_by([LOG.verifier, twin])
    assert Note.parse(SIGNED).verified_by([LOG.verifier, LOG.verifier]) == [LOG.verifier]


# Form


@pytest.mark.parametrize(
    "note",
    [
        "",
        "\n",
        TEXT,
        f"{TEXT}\n",
        f"{TEXT}\n\n",
        f"{TEXT}\n{LINE[:-1]}",
        f"{TEXT}\n{LINE}\n",
        f"{TEXT}\n{LINE}x",
        f"{TEXT}{LINE}",
        f"{TEXT}\n{LINE}".replace("\n", "\r\n"),
        f"{TEXT}\x00\n{LINE}",
        f"{TEXT}\t\n\n{LINE}",
        f"{TEXT}\ud800\n\n{LINE}",
        f"{TEXT}\n" + LINE.replace("—", "-"),
        f"{TEXT}\n" + LINE.replace("— ", "—  "),
        f"{TEXT}\n" + LINE.replace(LOG.name, "log+a"),
        f"{TEXT}\n" + LINE.replace(LOG.name, ""),
        f"{TEXT}\n" + LINE.replace(LOG.name, "log\u00a0a"),
        f"{TEXT}\n" + LINE.replace("\n", "=\n"),
        f"{TEXT}\n" + LINE.replace("\n", " x\n"),
        f"{TEXT}\n— {LOG.name} AAAAAA==\n",
        f"{TEXT}\n— {LOG.name} AAAAAAB=\n",
        f"{TEXT}\n— {LOG.name} AAAA_AA=\n",
        f"{TEXT}\n— {LOG.name} \n",
        f"{TEXT}\n— {LOG.name}\n",
        f"{TEXT}\n" + LINE * 101,
        "x" * 1_000_000 + f"\n\n{LINE}",
        "é" * 500_000 + f"\n\n{LINE}",
    ],
)
def test_what_is_not_exactly_a_note_is_refused(note: str) -> None:
    with pytest.raises(ProofError):
        Note.parse(note)


def test_a_text_may_have_blank_lines_and_a_note_a_hundred_signatures() -> None:
    text = "one\n\n\ntwo\n"
    note = Note.parse(f"{text}\n" + str(LOG.sign(text)) * 100)
    assert note.text == text
    assert note.verified_by([LOG.verifier]) == [LOG.verifier]


@pytest.mark.parametrize(
    ("text", "signatures"),
    [
        ("no newline", [LOG.sign(TEXT)]),
        ("tab\t\n", [LOG.sign(TEXT)]),
        (TEXT, [LOG.sign(TEXT)] * 101),
        (TEXT, [Signature("a b", bytes(4), bytes(64))]),
        (TEXT, [Signature("a\n", bytes(4), bytes(64))]),
        (TEXT, [Signature("a", bytes(3), bytes(64))]),
        (TEXT, [Signature("a", bytes(4), b"")]),
        (TEXT, []),
    ],
)
def test_what_could_not_be_read_again_is_not_written(text: str, signatures: list[Signature]) -> None:
    with pytest.raises(ProofError):
        str(Note(text, signatures))


# Checkpoints

ROOT = b64encode(b"\x07" * 32).decode()


def test_a_checkpoint_can_have_extensions_and_no_leaves() -> None:
    for text in (f"o\n5\n{ROOT}\none\ntwo two\n", f"o p\n0\n{b64encode(EMPTY_ROOT).decode()}\n"):
        assert str(Checkpoint.parse(text)) == text
    assert Checkpoint.parse(f"o\n5\n{ROOT}\none\ntwo\n").extension == ("one", "two")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "o\n5\n",
        f"o\n5\n{ROOT}",
        f"\n5\n{ROOT}\n",
        f"o\n05\n{ROOT}\n",
        f"o\n+5\n{ROOT}\n",
        f"o\n-5\n{ROOT}\n",
        f"o\n5 \n{ROOT}\n",
        f"o\n٥\n{ROOT}\n",
        f"o\n\n{ROOT}\n",
        f"o\n{2**63}\n{ROOT}\n",
        f"o\n{'9' * 5000}\n{ROOT}\n",
        f"o\n0\n{ROOT}\n",
        f"o\n5\n{ROOT[:-1]}\n",
        f"o\n5\n{ROOT[:-2]}d=\n",
        f"o\n5\n{b64encode(bytes(31)).decode()}\n",
        f"o\n5\n{ROOT} \n",
        f"o\n5\n{ROOT}\n\n",
        f"o\n5\n{ROOT}\n\nx\n",
        f"o\r\n5\n{ROOT}\n",
    ],
)
def test_what_is_not_exactly_a_checkpoint_is_refused(text: str) -> None:
    with pytest.raises(ProofError):
        Checkpoint.parse(text)


# Keys


def test_a_key_comes_back_from_its_text_under_any_name() -> None:
    signer = Signer.generate("log.example/acme")
    assert Signer.parse(signer.encode()) == signer
    assert Verifier.parse(str(signer.verifier)) == signer.verifier
    renamed = signer.renamed("log.example/acme/audit")
    assert renamed.verifier.public_key == signer.verifier.public_key
    assert renamed.verifier.key_id != signer.verifier.key_id
    assert Signer.generate("log.example/acme") != signer


def test_no_part_of_a_seed_is_shown() -> None:
    secret = LOG.encode().rsplit("+", 1)[1]
    assert secret not in repr(LOG) + str(LOG)
    assert "seed" not in repr(LOG)
    for broken in (LOG.encode()[:-1], LOG.encode() + "=", LOG.encode().replace("+KEY+", "+key+"), secret):
        with pytest.raises(ConfigError) as caught:
            Signer.parse(broken)
        assert secret[:8] not in str(caught.value)


@pytest.mark.parametrize(
    "vkey",
    [
        "",
        "a",
        "a+00000000",
        str(LOG.verifier)[:-1],
        str(LOG.verifier) + "\n",
        str(LOG.verifier).replace("example", "elsewhere"),
        str(LOG.verifier).replace("log.example", "log example"),
        str(LOG.verifier).replace(LOG.verifier.key_id.hex(), "00000000"),
        str(LOG.verifier).replace(LOG.verifier.key_id.hex(), LOG.verifier.key_id.hex() + "0"),
        "a+00000000+" + b64encode(b"\x02" + bytes(32)).decode(),
        "a+00000000+" + b64encode(b"\x01" + bytes(31)).decode(),
        "a+00000000+",
        LOG.encode(),
    ],
)
def test_what_is_no_verifier_key_is_refused(vkey: str) -> None:
    with pytest.raises(ConfigError):
        Verifier.parse(vkey)


def test_without_the_extra_a_note_is_read_and_verifying_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.ed25519", None)
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    note, verifier = Note.parse(SIGNED), Verifier.parse(EXAMPLE["vkey"])
    assert str(note) == SIGNED
    for use in (lambda: LOG.sign(TEXT), lambda: verifier.verify(TEXT, bytes(64)), lambda: Signer.generate("a")):
        with pytest.raises(ConfigError, match=r'pip install "tracevault\[seal\]"'):
            use()
