from trt_stand_in import *  # see there
from trt_stand_in import __version__, bool  # noqa: F401
