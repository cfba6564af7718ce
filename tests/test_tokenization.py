"""Rows as tokens: phases, long texts, chats, batches; with tokenizers of three kinds."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from workbench import bundled
from workbench.chat import render
from workbench.corpus import from_rows, read
from workbench.errors import InputError
from workbench.tokenization import PROMPT, TEMPLATE, WINDOW_TOKENS, Sequence, batches, plan, sequences, survey

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "Größe, façade, naïve: Überraschung!",
    "すべての人間は、生まれながらにして自由であり、",
    "всі люди народжуються вільними 😀👩‍👩‍👧",
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_level() -> PreTrainedTokenizerFast:
    """Like GPT-2, Qwen, Llama 3: multi-byte characters may be cut into several tokens; BOS in front."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS[:2], trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", chat_template=CHATML)


def word_piece() -> PreTrainedTokenizerFast:
    """Like BERT: white space is dropped, unknown words are one token; [CLS] in front and [SEP] behind."""
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.train_from_iterator(TEXTS, trainers.WordPieceTrainer(special_tokens=["[UNK]", "[CLS]", "[SEP]"]))
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", chat_template=CHATML
    )


def unigram() -> PreTrainedTokenizerFast:
    """Like SentencePiece: spaces are part of the tokens; EOS behind."""
    pieces = Tokenizer(models.Unigram())
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.decoder = decoders.Metaspace()
    special = ["<unk>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>")
    pieces.train_from_iterator(TEXTS, trainer)
    pieces.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>", eos_token="</s>", chat_template=CHATML)


TOKENIZERS = {"byte-level": byte_level(), "word-piece": word_piece(), "unigram": unigram()}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


@pytest.fixture(scope="module")
def demo_tokenizer():
    return AutoTokenizer.from_pretrained(bundled.path("models/demo"))


def tokens(rows, tokenizer, max_length=10_000, **options):
    return list(sequences(from_rows(rows), tokenizer, max_length=max_length, **options))


def refusal(rows, tokenizer, **options):
    with pytest.raises(InputError) as caught:
        tokens(rows, tokenizer, **options)
    return str(caught.value)


# Plain texts.


@each_tokenizer
def test_texts_become_what_the_tokenizer_makes_of_them(tokenizer):
    rows = [{"text": text, "lang": "x", "segment_id": n, "n": n} for n, text in enumerate(TEXTS)]
    found = tokens(rows, tokenizer)
    for n, (text, sequence) in enumerate(zip(TEXTS, found, strict=True)):
        assert sequence.token_ids.tolist() == tokenizer(text)["input_ids"]
        assert (sequence.token_ids.dtype, sequence.phase.dtype) == (np.int32, np.uint8)
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert sequence.token_ids[sequence.phase == PROMPT].tolist() == bare
        assert (sequence.phase == TEMPLATE).sum() == tokenizer.num_special_tokens_to_add()
        assert sequence.sha256 == hashlib.sha256(text.encode()).hexdigest()
        assert (sequence.seq, sequence.lang, sequence.segment_id, sequence.source) == (n, "x", str(n), "rows")
        assert sequence.metadata == {"n": n}


def test_special_tokens_that_a_text_spells_out_are_its_own():
    (sequence,) = tokens(["a <s> b"], TOKENIZERS["byte-level"])
    assert sequence.token_ids.tolist().count(0) == 2
    assert (sequence.phase == TEMPLATE).tolist() == [True] + [False] * (len(sequence.phase) - 1)


def test_a_tokenizer_written_in_python():
    (sequence,) = tokens(["ab"], ByT5Tokenizer())
    assert sequence.token_ids.tolist() == [ord("a") + 3, ord("b") + 3, 1]
    assert sequence.phase.tolist() == [PROMPT, PROMPT, TEMPLATE]


def test_several_corpora_are_numbered_through():
    parts = [from_rows(["a", "b"], "one"), from_rows(["c"], "two")]
    found = list(sequences(parts, TOKENIZERS["byte-level"], max_length=9))
    assert [(sequence.seq, sequence.source) for sequence in found] == [(0, "one"), (1, "one"), (2, "two")]


def test_a_text_without_any_token():
    assert "rows:2: the tokenizer makes no token of the text '\\u200b'" in refusal(
        ["a", "\u200b"], normalizing := word_piece_that_drops_invisible()
    )
    found = from_rows(["a", "\u200b", "b"], bad_rows="skip")
    assert [sequence.seq for sequence in sequences(found, normalizing, max_length=9)] == [0, 1]
    assert found.skipped.count == 1
    with pytest.raises(InputError, match="No row of the corpus can be tokenised"):
        list(sequences(from_rows(["\u200b"], bad_rows="skip"), normalizing, max_length=9))


def word_piece_that_drops_invisible():
    from tokenizers import normalizers

    tokenizer = word_piece()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    return tokenizer


@each_tokenizer
def test_long_texts_are_refused_by_default(tokenizer):
    length = len(tokenizer(TEXTS[0])["input_ids"])
    assert len(tokens([TEXTS[0]], tokenizer, max_length=length)) == 1
    message = refusal(["a", TEXTS[0]], tokenizer, max_length=length - 1)
    assert message.startswith(f"rows:2: the text has {length} tokens; expected at most {length - 1}")
    assert "--long split" in message
    assert "--long cut" in message


@each_tokenizer
@given(max_length=st.integers(3, 50), text=st.sampled_from(TEXTS))
def test_split_texts_hold_every_token_once(tokenizer, max_length, text):
    found = tokens(["a", text], tokenizer, max_length=max_length, long_texts="split")[1:]
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert np.concatenate([piece.token_ids[piece.phase == PROMPT] for piece in found]).tolist() == bare
    added = tokenizer.num_special_tokens_to_add()
    assert all(len(piece.token_ids) == max_length for piece in found[:-1])
    for part, piece in enumerate(found):
        assert added < len(piece.token_ids) <= max_length
        around = tokenizer("")["input_ids"]
        assert piece.token_ids[piece.phase == TEMPLATE].tolist() == around
        assert len(around) == added
        assert (np.diff(np.flatnonzero(piece.phase == PROMPT)) == 1).all(), "special tokens stand at the ends"
        assert piece.sha256 == hashlib.sha256(text.encode()).hexdigest()
        split = {"split_row": 1, "split_part": part, "split_parts": len(found)}
        assert piece.metadata == (split if len(found) > 1 else {})


@each_tokenizer
def test_cut_texts_are_what_the_tokenizer_truncates_to(tokenizer):
    (sequence,) = tokens([TEXTS[0]], tokenizer, max_length=10, long_texts="cut")
    assert sequence.token_ids.tolist() == tokenizer(TEXTS[0], truncation=True, max_length=10)["input_ids"]
    assert sequence.metadata == {}


def test_pieces_must_have_room_for_a_token():
    assert "expected at least 3" in refusal(["long " * 9], TOKENIZERS["word-piece"], max_length=2, long_texts="split")
    assert "max_length is 0" in refusal(["a"], TOKENIZERS["word-piece"], max_length=0)
    assert "long_texts is 'drop'" in refusal(["a"], TOKENIZERS["word-piece"], long_texts="drop")
    assert "no tokenizer" in refusal(["a"], None)


def test_a_row_of_200_kilobytes(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "short"}\n{"text": "' + "long " * 40_000 + '"}\n')
    tokenizer = TOKENIZERS["byte-level"]
    n = len(tokenizer("long " * 40_000)["input_ids"])
    with pytest.raises(InputError, match=f"t.jsonl:2: the text has {n:,} tokens; expected at most 512"):
        survey(sequences(read(path), tokenizer, max_length=512))
    assert survey(sequences(read(path), tokenizer, max_length=512, long_texts="cut")).longest == 512
    split = survey(sequences(read(path), tokenizer, max_length=512, long_texts="split"))
    assert split.n_sequences == 1 + -(-(n - 1) // 511)


# Chats.

CONTENTS = st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=20) | st.sampled_from(
    [*TEXTS, "user", "\n"]
)
CHATS = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), CONTENTS), min_size=1, max_size=5).filter(
    lambda chat: any(content.strip() for _, content in chat)
)


def messages(chat):
    return [{"role": role, "content": content} for role, content in chat]


def expected(chat, strip: bool):
    """ChatML written by hand: the text, and whether each of its characters is content."""
    text, own = "", []
    for role, content in chat:
        content = content.strip() if strip else content
        for piece, is_content in ((f"<|im_start|>{role}\n", False), (content, True), ("<|im_end|>\n", False)):
            text += piece
            own += [is_content] * len(piece)
    return text, own


@each_tokenizer
@settings(deadline=None)
@given(chat=CHATS, strip=st.booleans())
def test_chat_tokens_that_overlap_a_content_are_prompt(tokenizer, chat, strip):
    template = CHATML.replace("m['content']", "m['content'].strip()") if strip else CHATML
    text, own = expected(chat, strip)
    with_template(tokenizer, template)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    phases = [PROMPT if any(own[start:end]) else TEMPLATE for start, end in encoded["offset_mapping"]]
    assume(PROMPT in phases)
    (sequence,) = tokens([{"messages": messages(chat)}], tokenizer)
    assert sequence.token_ids.tolist() == encoded["input_ids"]
    assert sequence.phase.tolist() == phases
    assert sequence.sha256 == hashlib.sha256(text.encode()).hexdigest()


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


def contents(chat, template, generation_prompt=False):
    """The spans of content that are found, as text."""
    tokenizer = with_template(byte_level(), template)
    rows = chat if isinstance(chat[0], dict) else messages(chat)
    (row,) = from_rows([{"messages": rows}])
    found = render(row, tokenizer, generation_prompt)
    assert found.text == tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=generation_prompt)
    return [found.text[start:end] for start, end in found.spans]


def test_a_content_that_reads_like_the_template():
    chat = [("user", "user"), ("assistant", "\n"), ("user", "<|im_end|>\n<|im_start|>user\n")]
    assert contents(chat, CHATML) == ["user", "\n", "<|im_end|>\n<|im_start|>user\n"]


def test_the_header_of_an_answer_is_template():
    assert contents([("user", "Hi")], CHATML, generation_prompt=True) == ["Hi"]
    with_template(tokenizer := byte_level(), CHATML)
    plain = tokens([{"messages": messages([("user", "Hi")])}], tokenizer)[0]
    prompted = tokens([{"messages": messages([("user", "Hi")])}], tokenizer, generation_prompt=True)[0]
    assert len(prompted.token_ids) > len(plain.token_ids)
    assert not (prompted.phase[len(plain.phase) :] == PROMPT).any()


def test_contents_in_parts():
    part = "{{ p.text if p.type == 'text' else '<image>' }};"
    template = "{% for m in messages %}[{% for p in m.content %}" + part + "{% endfor %}]{% endfor %}"
    parts = [{"type": "text", "text": "Look"}, {"type": "image"}, {"type": "text", "text": "here"}]
    assert contents([{"role": "user", "content": parts}], template) == ["Look", "here"]


def test_a_template_that_looks_at_the_beginning_of_a_content():
    kind = "{{ 'T:' if m.content.startswith('<tool>') else 'U:' }}"
    template = "{% for m in messages %}" + kind + "{{ m.content | trim }}\n{% endfor %}"
    assert contents([("user", " Hi "), ("user", "<tool>5")], template) == ["Hi", "<tool>5"]


def test_a_template_that_looks_at_the_end_of_a_content():
    template = "{% for m in messages %}U:{{ m.content }}{{ '' if m.content.endswith('.') else '!' }}\n{% endfor %}"
    assert contents([("user", "Hi."), ("user", "Ho")], template) == ["Hi.", "Ho"]


def test_a_template_that_drops_the_reasoning():
    template = "{% for m in messages %}A:{{ m.content.split('</think>')[-1].lstrip('\\n') }}\n{% endfor %}"
    chat = [("assistant", "<think>why</think>\n\nbecause"), ("user", "so")]
    assert contents(chat, template) == ["because", "so"]


def test_a_template_that_repeats_a_content_and_one_that_leaves_messages_out():
    assert contents([("user", "a"), ("user", "b")], "{{ messages[0].content }}-{{ messages[0].content }}") == ["a", "a"]


def test_a_template_with_json():
    template = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}"
    assert contents([("user", 'say "ü"\n')], template) == ['say \\"ü\\"\\n']


def test_messages_with_other_keys():
    chat = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"x": 2}}}]},
        {"role": "tool", "content": "4", "name": "add"},
    ]
    template = "{% for m in messages %}{{ m.role }}:{{ m.content or (m.tool_calls | tojson) }}\n{% endfor %}"
    assert contents(chat, template) == ["2+2?", "4"]


def chat_refusal(chat, template):
    tokenizer = with_template(byte_level(), template)
    message = refusal([{"messages": messages(chat)}], tokenizer)
    assert message.startswith("rows:1: ")
    skipping = from_rows(
        ["text", {"messages": messages(chat)}, {"messages": messages([("user", "fine")])}], bad_rows="skip"
    )
    found = list(sequences(skipping, tokenizer, max_length=99))
    assert skipping.skipped.count + len(found) == 3
    return message


def test_chats_that_are_refused():
    assert "no chat template" in chat_refusal([("user", "Hi")], None)
    raising = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    assert "refuses the chat: no system role" in chat_refusal([("system", "Hi")], raising)
    shouting = "{% for m in messages %}{{ m.content[:3] }}{% endfor %}"
    assert "hides where they stand" in chat_refusal([("user", "Hello")], shouting)
    assert "private use plane 16" in chat_refusal([("user", "a\U00100002b")], CHATML)
    assert "makes no token" in chat_refusal([("user", "Hi")], "nothing of it")
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = CHATML
    assert "need a fast tokenizer" in refusal([{"messages": messages([("user", "Hi")])}], tokenizer)


def test_long_chats():
    tokenizer = with_template(byte_level(), CHATML)
    chat = [{"messages": messages([("user", TEXTS[0]), ("assistant", TEXTS[2])])}]
    (whole,) = tokens(chat, tokenizer)
    assert "--long split" in refusal(chat, tokenizer, max_length=20)
    pieces = tokens(chat, tokenizer, max_length=20, long_texts="split")
    assert np.concatenate([piece.token_ids for piece in pieces]).tolist() == whole.token_ids.tolist()
    assert np.concatenate([piece.phase for piece in pieces]).tolist() == whole.phase.tolist()
    (cut,) = tokens(chat, tokenizer, max_length=20, long_texts="cut")
    assert cut.token_ids.tolist() == whole.token_ids[:20].tolist()


def test_texts_and_chats_in_one_corpus_keep_their_order():
    tokenizer = with_template(byte_level(), CHATML)
    rows = [
        {"text": "a"},
        {"messages": messages([("user", "b")])},
        {"text": "c"},
        {"messages": messages([("user", "d")])},
    ]
    found = tokens(rows, tokenizer)
    bodies = [tokenizer.decode(sequence.token_ids[sequence.phase == PROMPT]) for sequence in found]
    assert bodies == ["a", "b", "c", "d"]


# Surveys.


def test_a_survey_counts_and_knows_the_corpus_again():
    tokenizer = TOKENIZERS["byte-level"]

    def surveyed(rows, max_length=9999, **options):
        return survey(sequences(from_rows(rows), tokenizer, max_length=max_length, **options))

    first = surveyed(TEXTS)
    lengths = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    assert (first.n_sequences, first.n_tokens, first.longest) == (4, sum(lengths), max(lengths))
    assert surveyed(TEXTS) == first
    others = [
        surveyed(TEXTS[::-1]),
        surveyed(TEXTS[:3]),
        surveyed([*TEXTS[:3], TEXTS[3] + " "]),
        surveyed(TEXTS, max_length=30, long_texts="split"),
        surveyed(TEXTS, max_length=30, long_texts="cut"),
        survey(sequences(from_rows(TEXTS), TOKENIZERS["unigram"], max_length=9999)),
    ]
    assert len({each.fingerprint for each in [first, *others]}) == 7


# Batches.


def sequence_of(length, seq):
    return Sequence(seq, np.zeros(length, np.int32), np.ones(length, np.uint8), None, None, None, None, {}, "")


LENGTHS = st.lists(st.integers(1, 300), max_size=80)


@given(lengths=LENGTHS, batch_tokens=st.integers(1, 1000), window=st.integers(1, 30))
def test_batches_hold_every_sequence_once_within_the_budget(lengths, batch_tokens, window):
    found = [sequence_of(length, seq) for seq, length in enumerate(lengths)]
    made = list(batches(iter(found), batch_tokens, window))
    order = [sequence.seq for batch in made for sequence in batch]
    assert sorted(order) == list(range(len(lengths)))
    for batch in made:
        sizes = [len(sequence.token_ids) for sequence in batch]
        assert len(batch) * max(sizes) <= batch_tokens or len(batch) == 1
        assert len({sequence.seq // window for sequence in batch}) == 1, "windows are consecutive sequences"
    again = [[sequence.seq for sequence in batch] for batch in batches(found, batch_tokens, window)]
    assert again == [[sequence.seq for sequence in batch] for batch in made]


@given(lengths=LENGTHS.filter(bool), batch_tokens=st.integers(300, 3000))
def test_no_two_neighbouring_batches_would_fit_into_one(lengths, batch_tokens):
    made = plan(lengths, batch_tokens)
    longest = [max(lengths[place] for place in batch) for batch in made]
    assert longest == sorted(longest)
    for batch, following in zip(made, made[1:], strict=False):
        first = min(lengths[place] for place in following)
        assert (len(batch) + 1) * first > batch_tokens


def test_little_is_padded():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(4, 1, 10_000).astype(int) + 1, 1024)
    made = list(batches((sequence_of(length, seq) for seq, length in enumerate(lengths)), 4096))
    padded = sum(len(batch) * max(len(sequence.token_ids) for sequence in batch) for batch in made)
    assert padded < 1.06 * lengths.sum()


def test_very_long_sequences_close_a_window_early():
    found = (sequence_of(WINDOW_TOKENS // 2, seq) for seq in range(1000))
    assert next(batches(found, 1))[0].seq == 0
    assert next(found).seq <= 2, "only as many were read as a window may hold"


def test_bad_batch_sizes():
    with pytest.raises(InputError, match="batch_tokens is 0"):
        next(batches([], 0))


# The bundled corpora under the bundled model's tokenizer.


def test_the_demo_sample_under_the_demonstration_model(demo_tokenizer):
    found = list(sequences(read("demo"), demo_tokenizer, max_length=1024))  # fits whole, no choice to make
    assert 300_000 <= survey(found).n_tokens <= 450_000
    langs, domains = Counter(), Counter()
    for sequence in found:
        langs[sequence.lang] += len(sequence.token_ids)
        domains[sequence.domain] += len(sequence.token_ids)
    assert min(langs.values()) > 1_000
    assert max(count for lang, count in langs.items() if lang != "en") < 16_000
    assert max(domains.values()) < 0.3 * domains.total()
    passages = Counter(sequence.domain for sequence in read("domains")).keys() - {"dialogue"}  # which has no more
    assert max(domains[domain] for domain in passages) < 1.6 * min(domains[domain] for domain in passages)


def test_chats_under_the_demonstration_model(demo_tokenizer):
    chat = [("system", "Kurz."), ("user", "Größe?"), ("assistant", "すべて")]
    (sequence,) = tokens([{"messages": messages(chat)}], demo_tokenizer)
    assert demo_tokenizer.decode(sequence.token_ids[sequence.phase == PROMPT]) == "Kurz.Größe?すべて"
    assert demo_tokenizer.decode(sequence.token_ids[sequence.phase == TEMPLATE]) == (
        "<|system|><|user|><|assistant|><|endoftext|>"
    )
