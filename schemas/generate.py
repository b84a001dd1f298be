"""Writes schemas/generated/: what the language is, for readers that are not Python.

`python -m schemas.generate` writes the files, `--check` only says which of them have drifted (exit 1). Every document
is a pure function of the models, so a change of an event shows as a change of a committed file. `DOCUMENTS` names
them; OpenAPI is not among them, since it needs the api's routes.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from schemas.events import CONTENT_TYPE, LOG_TOPIC, PROGRESS_TOPIC, LogEvent, UploadProgressed
from schemas.frames import CLIENT_FRAMES, CLOSE_CODES, SERVER_FRAMES

GENERATED = Path(__file__).parent / "generated"
LOG_EVENTS: tuple[type[BaseModel], ...] = get_args(LogEvent)
EVENTS: tuple[type[BaseModel], ...] = (*LOG_EVENTS, UploadProgressed)
FRAMES: tuple[type[BaseModel], ...] = (*CLIENT_FRAMES, *SERVER_FRAMES)
_SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def events_schema() -> dict[str, Any]:
    """JSON Schema of the data of every event; each is at `#/$defs/<Name>`, its `ce_type` is its title."""
    return {
        "$schema": _SCHEMA_DIALECT,
        "$id": "urn:sluice:schemas:events",
        "title": "Events of Sluice",
        "description": "The value of each record: the data of a CloudEvent, whose type stands in the header ce_type.",
        "$defs": _schemas(EVENTS, at="#/$defs/"),
    }


def asyncapi() -> dict[str, Any]:
    """The AsyncAPI 3 document: the log, the progress topic, and the conversation over WebSocket."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Sluice",
            "version": "1",
            "description": "The facts of the log, the percentages beside it, and the live messages made of both.",
            "license": {"name": "MIT"},
        },
        "defaultContentType": CONTENT_TYPE,
        "servers": {
            "kafka": {"host": "127.0.0.1:9092", "protocol": "kafka"},
            "notifier": {
                "host": "127.0.0.1:8081",
                "protocol": "ws",
                "security": [{"$ref": "#/components/securitySchemes/token"}],
            },
        },
        "channels": {
            "log": _topic(
                LOG_TOPIC,
                LOG_EVENTS,
                "The facts, for ever and in order. Times are the broker's (LogAppendTime).",
                {"cleanup.policy": ["delete"], "retention.ms": -1, "retention.bytes": -1, "max.message.bytes": 8388608},
            ),
            "progress": _topic(
                PROGRESS_TOPIC,
                (UploadProgressed,),
                "Percentages, kept for an hour: losing them loses no fact.",
                {"cleanup.policy": ["delete"], "retention.ms": 3_600_000},
            ),
            "socket": _socket(),
        },
        "operations": {
            "appendFact": _operation("send", "log", LOG_EVENTS, "The api and the processor append facts."),
            "readFact": _operation("receive", "log", LOG_EVENTS, "Every service reads them, in order."),
            "sendProgress": _operation("send", "progress", (UploadProgressed,), "The processor tells how far it is."),
            "readProgress": _operation("receive", "progress", (UploadProgressed,), "The notifier passes it on."),
            "hearClient": _operation("receive", "socket", CLIENT_FRAMES, "What clients say to the notifier."),
            "tellClient": _operation("send", "socket", SERVER_FRAMES, "What the notifier tells them."),
        },
        "components": {
            "messages": {
                **{model.__name__: _kafka_message(model) for model in EVENTS},
                **{model.__name__: _frame_message(model) for model in FRAMES},
            },
            "schemas": _schemas((*EVENTS, *FRAMES), at="#/components/schemas/"),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
        },
    }


DOCUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "events.schema.json": events_schema,
    "asyncapi.json": asyncapi,
}


def drifted(folder: Path = GENERATED) -> list[str]:
    """The names of the documents that are missing or not what the models say."""
    return [name for name, document in DOCUMENTS.items() if _read(folder / name) != text_of(document())]


def text_of(document: dict[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n"


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        sys.stderr.write("usage: python -m schemas.generate [--check]\n")
        return 2
    stale = drifted()
    if arguments:
        for name in stale:
            sys.stderr.write(f"schemas/generated/{name} is not what the models say: run python -m schemas.generate\n")
        return 1 if stale else 0
    GENERATED.mkdir(exist_ok=True)
    for name in stale:
        (GENERATED / name).write_text(text_of(DOCUMENTS[name]()), encoding="utf-8")
        sys.stdout.write(f"wrote schemas/generated/{name}\n")
    return 0


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _schemas(models: Iterable[type[BaseModel]], *, at: str) -> dict[str, Any]:
    """The JSON Schema of each model and of what it is made of, by name."""
    _, found = models_json_schema([(model, "validation") for model in models], ref_template=at + "{model}")
    schemas: dict[str, Any] = {name: _plain(schema) for name, schema in sorted(found["$defs"].items())}
    for model in EVENTS:
        if model.__name__ in schemas:
            del schemas[model.__name__]["properties"]["type"]  # stands in the header ce_type
            schemas[model.__name__]["title"] = _type_of(model)
    return schemas


def _plain(schema: Any) -> Any:
    """A schema without the titles pydantic makes of member names, and with its descriptions on one line."""
    match schema:
        case dict():
            kept = {name: _plain(inner) for name, inner in schema.items() if not (name == "title" and _is_text(inner))}
            if _is_text(kept.get("description")):
                kept["description"] = " ".join(kept["description"].split())
            return kept
        case list():
            return [_plain(inner) for inner in schema]
        case _:
            return schema


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _type_of(model: type[BaseModel]) -> str:
    return str(model.model_fields["type"].default)


def _summary(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split())


def _topic(
    address: str, models: Iterable[type[BaseModel]], description: str, configuration: dict[str, Any]
) -> dict[str, Any]:
    kafka = {"topic": address, "topicConfiguration": configuration, "bindingVersion": "0.5.0"}
    return {
        "address": address,
        "description": description,
        "servers": [{"$ref": "#/servers/kafka"}],
        "messages": {model.__name__: {"$ref": f"#/components/messages/{model.__name__}"} for model in models},
        "bindings": {"kafka": kafka},
    }


def _socket() -> dict[str, Any]:
    closes = "; ".join(f"{code}: {reason}" for code, reason in CLOSE_CODES.items())
    return {
        "address": "/v1/ws",
        "description": f"A text frame holds one message, or several separated by newlines. Close codes: {closes}.",
        "servers": [{"$ref": "#/servers/notifier"}],
        "messages": {model.__name__: {"$ref": f"#/components/messages/{model.__name__}"} for model in FRAMES},
        "bindings": {"ws": {"method": "GET", "bindingVersion": "0.1.0"}},
    }


def _operation(action: str, channel: str, models: Iterable[type[BaseModel]], summary: str) -> dict[str, Any]:
    return {
        "action": action,
        "channel": {"$ref": f"#/channels/{channel}"},
        "summary": summary,
        "messages": [{"$ref": f"#/channels/{channel}/messages/{model.__name__}"} for model in models],
    }


def _kafka_message(model: type[BaseModel]) -> dict[str, Any]:
    """A CloudEvent in Kafka's binary mode: attributes are headers, the data is the value, the batch id the key."""
    of_batch = "batch_id" in model.model_fields
    texts: dict[str, Any] = {name: {"type": "string"} for name in ("ce_source", "ce_time", "traceparent")}
    headers: dict[str, Any] = {
        "ce_specversion": {"type": "string", "const": "1.0"},
        "ce_id": {"type": "string", "format": "uuid"},
        "ce_type": {"type": "string", "const": _type_of(model)},
        **({"ce_subject": {"type": "string", "format": "uuid"}} if of_batch else {}),
        "content-type": {"type": "string", "const": CONTENT_TYPE},
        **texts,
    }
    required = [name for name in headers if name != "traceparent"]
    key = {"type": "string", "format": "uuid", "description": "the batch id"} if of_batch else {"type": "null"}
    return {
        "name": _type_of(model),
        "summary": _summary(model),
        "contentType": CONTENT_TYPE,
        "headers": {"type": "object", "required": required, "properties": headers},
        "payload": {"$ref": f"#/components/schemas/{model.__name__}"},
        "bindings": {"kafka": {"key": key, "bindingVersion": "0.5.0"}},
    }


def _frame_message(model: type[BaseModel]) -> dict[str, Any]:
    return {
        "name": model.__name__,
        "summary": _summary(model),
        "contentType": CONTENT_TYPE,
        "payload": {"$ref": f"#/components/schemas/{model.__name__}"},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
