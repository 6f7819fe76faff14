"""Keys of a config that nothing here reads: they change no number, or are refused by name.

Such a key may ask for what a decoder does not do, ``final_logit_softcapping`` for one; to
leave it out would give other logits in silence. What is null, false, zero or empty asks for
nothing. At the top of a config, where publishers add what they like, a key is refused if its
name is one of arithmetic; inside ``rope_scaling`` and ``quantization_config``, whatever it is.
The lists are of what transformers' configs of these families write by default, and of what
publishers add: names and versions, token ids, defaults of generation, caching, training.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

WHO = "from_pretrained"

# Any value passes: it is not about what the model computes.
_NOTES = re.compile(
    r"^_|^unsloth_|^transformers\b|_token_ids?$|(bos|eos|pad|unk|sep|cls|mask)_token$"
    r"|_version$|_dtype$|dropout$|_pdrop$"
)

ANY = re.compile("")

# Names of what changes numbers.
ARITHMETIC = re.compile(
    r"softcap|multiplier|scal(e|ing|ar)|clip|qk_?(layer)?norm|alibi|rope|rotary|chunk|window|causal"
    r"|bidirectional|parallel|residual|experts?|moe|adapter|lora|conv_|ssm|mamba|sink|channels"
    r"|_bits|group_size|^quantization$"
)

_ABOUT = (
    "architectures auto_map base_model dtype finetuning_task id2label is_llama_config label2id "
    "license model_type name num_labels tokenizer_class torch_dtype"
)
_TRAINING = (
    "gradient_checkpointing initializer_range initializer_factor mup_denominator "
    "neftune_noise_alpha pad_to_multiple_of pretraining_tp problem_type shift_labels tf_legacy_loss"
)
_RUNNING = (
    "attn_implementation cache_implementation chunk_size_feed_forward is_decoder max_seq_len "
    "max_sequence_length max_window_layers model_max_length num_logits_to_keep "
    "output_attentions output_hidden_states return_dict seq_length torchscript use_bfloat16 "
    "use_cache use_flash_attn use_return_dict"
)
_GENERATION = (
    "bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping "
    "encoder_no_repeat_ngram_size exponential_decay_length_penalty length_penalty max_length "
    "max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams "
    "num_return_sequences output_scores prefix remove_invalid_values repetition_penalty "
    "return_dict_in_generate suppress_tokens task_specific_params temperature top_k top_p typical_p"
)

# Of config.json.
PASSING = frozenset(f"{_ABOUT} {_TRAINING} {_RUNNING} {_GENERATION}".split())

# The value of a key with which it asks for nothing; another is refused.
NEUTRAL: Mapping[str, Any] = {
    "activation": "swiglu",  # beside hidden_act, in Falcon3
    "embedding_multiplier": 1,
    "input_bits": 8,  # of BitnetForCausalLM
    "is_causal": True,
    "logit_scale": 1,
    "logits_scaling": 1,
    "partial_rotary_factor": 1,
    "residual_multiplier": 1,
    "scale_emb": 1,
    "use_mup": True,
    "use_rope": True,
    "weight_bits": 1,
}


class Keys:
    """A JSON object whose values are checked as they are asked for."""

    def __init__(self, content: Mapping[str, Any], defaults: Mapping[str, Any], where: str):
        self.content, self.defaults, self.where = content, defaults, where
        self.asked: set[str] = set()

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """A value of a kind; ``...`` as default: it must be there."""
        self.asked.add(key)
        value = self.content.get(key)
        if value is None:
            value = self.defaults.get(key, default)
        if value is ...:
            raise ValueError(
                f"{WHO}: {self.where} has no `{key}`. Download the checkpoint's own file."
            )
        if kind is float and type(value) is int:
            value = float(value)
        if value is not None and type(value) is not kind:
            refuse(key, value, f"a {kind.__name__} in {self.where}")
        return value

    def refuse_rest(
        self, passing: Collection[str], neutral: Mapping[str, Any], named: re.Pattern[str] = ANY
    ) -> None:
        """Refuses keys that nothing asked for; call it when all are."""
        refuse_unknown(self.content, self.asked | {*passing}, neutral, self.where, named)


def refuse_unknown(
    content: Mapping[str, Any],
    known: Collection[str],
    neutral: Mapping[str, Any],
    where: str,
    named: re.Pattern[str],
) -> None:
    """Refuses keys that are not known and may change what a model computes.

    Args:
      content: the object.
      known: keys that were read, or that change no number.
      neutral: the value of a key with which it changes none.
      where: what holds the object, for the error.
      named: of the others, those whose names match are refused.

    Raises:
      ValueError: with the keys by name.
    """
    said = [
        f"`{key}` is {value!r:.100}"
        for key, value in sorted(content.items())
        if key not in known
        and not _NOTES.search(key)
        and (key in neutral or named.search(key))
        and not _asks_nothing(key, value, neutral)
    ]
    if said:
        shown = ", ".join(said[:4]) + (", ..." if len(said) > 4 else "")
        raise ValueError(
            f"{WHO}: in {where} {shown}, which this library does not know, and which may change "
            f"what the model computes. If it does not, remove it from {where}."
        )


def _asks_nothing(key: str, value: Any, neutral: Mapping[str, Any]) -> bool:
    if key in neutral:
        return value is None or value == neutral[key]
    return not value


def refuse(key: str, value: Any, wanted: str) -> NoReturn:
    """Reports a key of a config that this library cannot follow."""
    raise ValueError(f"{WHO}: `{key}` is {value!r:.200}, and must be {wanted}.")
