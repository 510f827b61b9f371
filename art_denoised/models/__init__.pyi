from .loading import EvalTransform as EvalTransform
from .loading import PretrainedClassifier as PretrainedClassifier
from .loading import find_device as find_device
from .loading import list_classifiers as list_classifiers
from .loading import load_classifier as load_classifier
from .loading import load_module as load_module
from .loading import load_weights as load_weights
from .loading import read_state_dict as read_state_dict
