"""A tokenizer of a few dozen tokens, with the files of a chat model's folder."""

from pathlib import Path

SENTENCES = ["the cat sat on the mat", "the dog ran to the cat", "and the owl saw them"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_tokenizer(folder: Path, vocab_size: int = 48, template: str | None = TEMPLATE) -> Path:
    """Write tokenizer.json and related files; `<s>` is prepended, and words include the space before them.

    Trained on lower-case words; any other character is `<unk>`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "<end>", "<user>", "<assistant>"]
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    inner.train_from_iterator(SENTENCES * 3, trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    outer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<end>", unk_token="<unk>")
    outer.chat_template = template
    outer.save_pretrained(str(folder))
    return folder
