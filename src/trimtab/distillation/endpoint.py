"""A generator behind an OpenAI-compatible server: ``POST <endpoint>/completions``."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from typing import Any

from trimtab.training.errors import RunError

__all__ = ["continuations"]

WAIT = 120  # seconds for one answer


def continuations(
    endpoint: str, prompt: str, *, model: str | None, count: int, tokens: int, seed: int, temperature: float, top_p: float,
    key_variable: str,
) -> list[str]:  # fmt: skip
    """``count`` sampled continuations of ``prompt``; the key, if the server wants one, stands in an environment variable.

    Raises:
        RunError: the server cannot be reached, refuses, or answers something else.
    """
    sampling = {"max_tokens": tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    body: dict[str, Any] = {"prompt": prompt, "n": count, **sampling, **({} if model is None else {"model": model})}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(key_variable):
        headers["Authorization"] = f"Bearer {key}"
    address = endpoint.rstrip("/") + "/completions"
    request = urllib.request.Request(address, data=json.dumps(body).encode(), headers=headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=WAIT) as answer:
            found = json.loads(answer.read())
        return [choice["text"] for choice in found["choices"]]
    except urllib.error.HTTPError as error:
        said = error.read()[:200].decode("utf-8", "replace")
        raise RunError(
            f"{address} refused with status {error.code}: {said!r}; check the address, the model and {key_variable}"
        ) from error
    except (urllib.error.URLError, TimeoutError) as error:
        raise RunError(
            f"{address} cannot be reached ({error}); what was drawn so far is kept: start the server and run again"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{address} answered something else than completions ({error!r}); is it OpenAI-compatible?") from error
