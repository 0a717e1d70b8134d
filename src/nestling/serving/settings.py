"""What a service is asked to be: where it listens, who may use it, how much of it, with which tools."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, model_validator

from nestling.core.config import Config
from nestling.core.errors import UserError


class Key(Config):
    """One user of the service."""

    name: str = Field(description="Who holds the key; stands in the log.")
    secret: SecretStr = Field(description="What the client sends as its API key.")
    requests_per_minute: int | None = Field(None, ge=1, description="Instead of the service's own limit.")
    tokens_per_minute: int | None = Field(None, ge=1, description="Instead of the service's own limit.")
    runs: bool = Field(False, description="Whether its holder may look at training runs, which show data and settings.")


class ServeSettings(Config):
    """Settings of `nestling serve`.

    >>> ServeSettings(port=9000).host
    '127.0.0.1'
    """

    host: str = Field("127.0.0.1", description="Address to listen on; anything but loopback demands a key.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    keys: tuple[Key, ...] = Field((), description="Who may use the service; empty: anybody on this machine.")
    requests_per_minute: int = Field(0, ge=0, description="Requests of one key in a minute; 0: no limit.")
    tokens_per_minute: int = Field(0, ge=0, description="Tokens read and written for one key in a minute; 0: no limit.")
    max_body_bytes: int = Field(4 * 2**20, ge=1024, description="Largest request body that is read.")
    max_requests: int = Field(512, ge=1, description="Texts waiting or being written per model; more are refused.")
    max_choices: int = Field(16, ge=1, description="Most choices (n, or prompts × n) of one request.")
    rows: int = Field(64, ge=1, description="Texts of a model that are written at once; others wait for their turn.")
    capacity: int | None = Field(None, ge=2, description="Longest prompt with reply, in tokens; the model's context.")
    dtype: Literal["fp32", "bf16", "fp16", "int8"] = Field(
        "fp32", description="Precision of weights; below fp32 rounding may make a reply depend on who shares the batch."
    )
    tools: dict[str, dict[str, Any]] = Field({}, description="Tools that the service runs itself, each with settings.")
    tool_rounds: int = Field(4, ge=1, description="Rounds of tool calls in one reply; a further call ends it.")
    tool_seconds: float = Field(30.0, gt=0, description="A tool that takes longer is told to the model as an error.")
    tool_threads: int = Field(32, ge=1, description="Tools of a model that run at once; others wait for their turn.")
    opens_thought: bool = Field(
        False, description="Begin replies with <think> when reasoning_effort asks for it, for models that learnt it."
    )
    cors_origins: tuple[str, ...] = Field((), description="Web origins whose pages may call the service; none.")
    hosts: tuple[str, ...] = Field((), description="Names by which the service may be called, beside its address.")
    flush_seconds: float = Field(
        0.05, ge=0, description="A stream is sent new text at most this often; its beginning and its end at once."
    )
    stall_seconds: float = Field(60.0, gt=0, description="A client that reads nothing for so long is cut off.")
    shutdown_seconds: float = Field(10.0, ge=0, description="How long open replies may go on after Ctrl-C.")
    kept_responses: int = Field(1000, ge=0, description="Latest responses of a key remembered for previous_response_id.")
    log_text: bool = Field(False, description="Write prompts and replies to the log too.")
    moderation: bool = Field(True, description="Judge prompts and replies where a moderation model is served.")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False

    @model_validator(mode="after")
    def _reachable_means_keyed(self) -> Self:
        if not self.is_loopback and not self.keys:
            raise UserError(
                "others could reach the service without a key", where="host", value=self.host,
                fix="give keys, or listen on 127.0.0.1",
            )  # fmt: skip
        return self
