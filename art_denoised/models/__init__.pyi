from .classifiers import EvalTransform as EvalTransform
from .classifiers import PretrainedClassifier as PretrainedClassifier
from .classifiers import find_device as find_device
from .classifiers import list_classifiers as list_classifiers
from .classifiers import load_classifier as load_classifier
from .classifiers import load_module as load_module
from .classifiers import load_weights as load_weights
from .classifiers import read_state_dict as read_state_dict
