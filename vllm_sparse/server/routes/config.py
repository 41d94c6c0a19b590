"""``/v1/sparse/config``: what requests without settings of their own get, read and changed while the server runs."""

from __future__ import annotations

import json
import logging
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, HTTPException, Request, Response

from vllm_sparse.config.settings import ServerConfig
from vllm_sparse.server.routes.served import ServedSparsely
from vllm_sparse.server.runtime_config import (
    FixedSettingError,
    OutdatedError,
    RunningConfig,
    change_config,
    running_config,
)

router = APIRouter(prefix="/v1/sparse", tags=["sparse attention"])
logger = logging.getLogger("vllm.sparse")


@router.get("/config")
def read_config(served: ServedSparsely, response: Response) -> dict[str, Any]:
    """The configuration that counts now, its version, and the version's entity tag as ETag."""
    return _answer(running_config(served.start), response)


@router.put("/config")
def write_config(
    served: ServedSparsely,
    request: Request,
    response: Response,
    settings: Annotated[dict[str, Any], Body()],
    if_match: Annotated[str | None, Header()] = None,
) -> dict[str, Any]:
    """Replace the configuration on all API servers at once.

    The body is a ``"sparse"`` object of ``--additional-config``; what it leaves out is as on the command line.
    Answers 400 to a wrong setting, 409 to one that cannot change while the server runs, 412 where If-Match names
    another version; nothing changes then.
    """
    try:
        old, new = change_config(served, settings, if_match)
    except OutdatedError as error:
        raise HTTPException(412, str(error)) from error
    except FixedSettingError as error:
        raise HTTPException(409, str(error)) from error
    except ValueError as error:
        raise HTTPException(400, str(error)) from error
    if new != old:
        logger.info(
            "Sparse attention: %s changed the configuration, version %d to %d: %s",
            request.client.host if request.client else "a local client",
            old.version,
            new.version,
            _differences(old.config, new.config),
        )
    return _answer(new, response)


def _answer(running: RunningConfig, response: Response) -> dict[str, Any]:
    response.headers["ETag"] = running.etag
    return {"version": running.version, "config": running.config.model_dump(mode="json")}


def _differences(old: ServerConfig, new: ServerConfig) -> str:
    """Settings that differ, with both values, on one line."""
    return ", ".join(
        f"{name} {json.dumps(before)} -> {json.dumps(after)}"
        for (name, before), (_, after) in zip(
            old.model_dump(mode="json").items(), new.model_dump(mode="json").items(), strict=True
        )
        if before != after
    )
