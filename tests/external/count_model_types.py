"""List every model type of the installed transformers that has experts, and what moezoo does with it.

    python -m tests.external.count_model_types            # prints the page
    python -m tests.external.count_model_types --write    # writes writings/model_types.md

Needs transformers, without torch, and moezoo. A type has experts if its config, or one inside of it, has a field named
after them. It counts if transformers has a causal language model for it.
"""

import argparse
import sys
from pathlib import Path

import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "writings" / "model_types.md"
sys.path.insert(0, str(ROOT))

from moezoo.core.huggingface.family import families  # noqa: E402

CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
REASONS = {
    "encoder-decoder": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "classifies tokens, attends in both directions": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "multimodal, and its text model has no class of its own": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
NEEDS = {
    "diffusion_gemma": "writes by diffusion: a canvas that attends in both directions has the only logits",
    "mistral_large4": "needs latents that layers share, learned frequencies, a learned temperature per head, and an "
    "indexer with both",
    "muse_spark": "needs norms of experts' outputs, of the latent and of heads, norms of scaled inputs, and gated sums "
    "of the residual stream",
    "unlimited_ocr": "needs windows that begin behind the prompt",
}
"""What is missing here for a text model, by the type of its wrapper."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    text = page()
    if options.write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


def page() -> str:
    """Return the page: a table of causal language models, and one of the other types."""
    known = families()
    types = sorted(name for name in CONFIG_MAPPING_NAMES if has_experts(name))
    causal = [name for name in types if name in CAUSAL]
    others = [name for name in types if name not in CAUSAL]
    refused = [name for name in causal if text_type(name) not in known]
    lines = [
        "# Model types of transformers",
        "",
        f"Of the {len(types)} model types of transformers {transformers.__version__} that have experts, {len(causal)} "
        "have a causal language model.",
        f"moezoo opens {len(causal) - len(refused)} of these. This page is written by",
        "[`count_model_types.py`](../tests/external/count_model_types.py), which counts in the installed transformers.",
        "",
        "| model type | class | moezoo |",
        "|---|---|---|",
        *(f"| `{name}` | `{CAUSAL[name]}` | {outcome(name)} |" for name in causal),
        "",
        "## Without a causal language model",
        "",
        "| model type | moezoo |",
        "|---|---|",
        *(f"| `{name}` | {outcome(name)} |" for name in others),
    ]
    return "\n".join(lines) + "\n"


def has_experts(model_type: str) -> bool:
    """Return whether a model type's config has a field named after experts, or a config inside of it has."""
    return _names_experts(CONFIG_MAPPING[model_type])


def _names_experts(config: type) -> bool:
    own = {name for each in config.__mro__ for name in getattr(each, "__annotations__", {})}
    if any("expert" in name for name in own):
        return True
    inner = getattr(config, "sub_configs", {})
    if any(_names_experts(each) for each in inner.values() if each is not config):
        return True
    if transformers.AutoConfig not in inner.values():
        return False
    try:  # the default of a text model of any type
        found = config()
    except Exception:  # some have no possible default
        return False
    return any(_names_experts(type(getattr(found, name, None))) for name in inner)


def text_type(model_type: str) -> str:
    """Return the model type of the text model in a wrapper; of another type itself."""
    if model_type in families():
        return model_type
    inner = getattr(CONFIG_MAPPING[model_type], "sub_configs", {}).get("text_config")
    found = getattr(inner, "model_type", "")
    if inner is transformers.AutoConfig:
        try:  # the default of a text model of any type
            found = CONFIG_MAPPING[model_type]().text_config.model_type
        except Exception:  # some have no possible default
            found = ""
    return found or model_type


def outcome(model_type: str) -> str:
    """Return what moezoo does with a model type: a family that opens it, or why there is none."""
    family, text = families().get(text_type(model_type)), text_type(model_type)
    if family is not None and (text == model_type or model_type in CAUSAL):
        return "open" if family.name == model_type else f"open, as `{family.name}`"
    if family is not None:
        return f"a wrapper; its text model, `{text}`, is open"
    if model_type in CAUSAL:
        return "refused"
    if model_type.removesuffix("_text") in NEEDS:
        return NEEDS[model_type.removesuffix("_text")]
    for reason, mapping in REASONS.items():
        if model_type in mapping:
            return reason
    if model_type.endswith("_text"):
        return "text model of a wrapper, without a class of its own"
    return "no causal language model"


if __name__ == "__main__":
    sys.exit(main())
