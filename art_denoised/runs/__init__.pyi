from .identity import differences as differences
from .identity import identity as identity
from .journal import Kind as Kind
from .journal import Row as Row
from .journal import Run as Run
from .journal import read_run as read_run
