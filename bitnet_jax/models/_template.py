"""Chat templates, run in a sandbox that bounds what they may do.

A template comes with a checkpoint and is a program. Here it reaches no attribute that
Python keeps private, no file, no import and no include. It may take so many steps and
make so much text, and is stopped where it would take more: loops and macro calls are
counted, and what multiplies text is bounded before it is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitnet_jax.models._template_limits import TEXT, TemplateError, stop


def render(
    source: str, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, str], **extra: Any
) -> str:
    """The text of a conversation, ready for the model's turn.

    Args:
      source: a Jinja template.
      messages: mappings with a role and a content.
      tokens: special tokens by name, ``bos_token`` and the like.
      **extra: more names for the template.
    """
    try:
        import jinja2

        from bitnet_jax.models._sandbox import Sandbox
    except ImportError as error:
        raise ImportError(
            "generate: jinja2 is missing, and chat templates need it. Install it with: pip "
            "install 'bitnet_jax[models]', or pass the text of the conversation."
        ) from error
    if len(source) > TEXT // 16:
        stop(f"it is longer than {TEXT // 16} characters")
    context = {"messages": messages, "add_generation_prompt": True, **tokens, **extra}
    try:
        return Sandbox().from_string(source).render(context)
    except TemplateError:
        raise
    except (jinja2.TemplateError, RecursionError, OverflowError, MemoryError) as error:
        raise TemplateError(
            f"generate: the checkpoint's chat template failed: {type(error).__name__}: {error}. "
            "Pass the text of the conversation instead of messages."
        ) from None
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise TemplateError(
            f"generate: the checkpoint's chat template does not take these messages: {error}. "
            "Give each a role and a content, or pass the text of the conversation."
        ) from None
