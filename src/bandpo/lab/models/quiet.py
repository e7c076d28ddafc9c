"""Messages of the libraries that are false alarms here; all their others are left alone."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from transformers.utils import logging as transformers_logging

FALSE_ALARMS = {
    # it is the embedding itself in a model that ties the two, and is not saved twice
    "transformers.trainer": "There were missing keys in the checkpoint model loaded: ['lm_head.weight'].",
    # generate() itself drops a mask without gaps, and then misses it once the first sequence has ended
    "transformers.modeling_utils": "We strongly recommend passing in an `attention_mask`",
    # checkpoints written within a second; the numbers in their names are what it then goes by
    "transformers.trainer_utils": "mtime may not be reliable on this filesystem",
}


@contextmanager
def without_noise() -> Iterator[None]:
    """Keep the libraries' progress bars and false alarms off the screen for the block."""
    bars, data_bars = transformers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    filters = [(logging.getLogger(name), _without(text)) for name, text in FALSE_ALARMS.items()]
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for logger, dropped in filters:
        logger.addFilter(dropped)
    try:
        with warnings.catch_warnings():
            # TRL asks transformers by a name that transformers is about to change
            old_names = "`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated"
            warnings.filterwarnings("ignore", old_names, FutureWarning)
            yield
    finally:
        for logger, dropped in filters:
            logger.removeFilter(dropped)
        if bars:
            transformers_logging.enable_progress_bar()
        if not data_bars:
            datasets.enable_progress_bars()


def _without(text: str) -> logging.Filter:
    class Without(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            return not record.getMessage().startswith(text)

    return Without()
