from .loading import find_device as find_device
from .loading import load_module as load_module
from .weights import fitting_state as fitting_state
from .weights import load_weights as load_weights
from .weights import read_state_dict as read_state_dict
