"""Where the settings of a service come from, and how a wrong one is named.

Sources, strongest first: options, environment (the prefix of the service), a TOML file (--config, or the variable that
the service names), defaults. Promises that every wrong setting is named at once, that no value is repeated in an error,
and that what is shown contains no secret. What the settings are is the service's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from pydantic import ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, TomlConfigSettingsSource

from bsns.protocol.endpoints import masked_url

_URLS: Final = ("_url", "_endpoint")


class ServiceSettings(BaseSettings):
    """Base of the settings of one service."""

    config_file_variable: ClassVar[str]
    """Environment variable that names the TOML file."""
    settings_error: ClassVar[type[Exception]]
    """What `load` raises; the message says which setting is wrong and why."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        sources = init_settings, env_settings
        file = os.environ.get(cls.config_file_variable)
        return (*sources, TomlConfigSettingsSource(settings_cls, Path(file))) if file else sources

    @classmethod
    def load(cls, config: Path | None = None, **options: Any) -> Self:
        """From options (None: not given) and the other sources; `settings_error` names each bad setting, no value."""
        if config is not None:
            os.environ[cls.config_file_variable] = str(config)
        file = os.environ.get(cls.config_file_variable)
        if file and not Path(file).is_file():
            raise cls.settings_error(f"there is no settings file {file}")
        try:
            return cls(**{name: value for name, value in options.items() if value is not None})
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or 'settings'}: {item['msg']}"
                for item in error.errors(include_url=False, include_input=False)
            )
            raise cls.settings_error(f"settings cannot be used: {problems}") from error
        except (OSError, ValueError) as error:
            raise cls.settings_error(f"the settings file cannot be read: {error}") from error

    def shown(self) -> dict[str, Any]:
        """The effective values for people; secrets masked, also those inside a URL."""
        values = self.model_dump(mode="json")
        urls = {name: masked_url(value) for name, value in values.items() if name.endswith(_URLS) and value is not None}
        return {**values, **urls}
