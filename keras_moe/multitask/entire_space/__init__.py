"""Models of chains of events over all impressions, one paper a file."""

from keras_moe.multitask.entire_space.aitm import AITM
from keras_moe.multitask.entire_space.dbmtl import DBMTL
from keras_moe.multitask.entire_space.escm2 import ESCM2
from keras_moe.multitask.entire_space.esmm import ESMM
from keras_moe.multitask.entire_space.naive import NaiveConversion

__all__ = ["AITM", "DBMTL", "ESCM2", "ESMM", "NaiveConversion"]
