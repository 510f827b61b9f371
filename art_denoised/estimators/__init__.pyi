from .adapters import ArtAttack as ArtAttack
from .adapters import ask_estimator as ask_estimator
from .adapters import without_preprocessing as without_preprocessing
from .networks import FeatureDenoisingClassifier as FeatureDenoisingClassifier
from .networks import RobustTrainer as RobustTrainer
from .purification import DiffusionPurification as DiffusionPurification
from .rdc import RobustDiffusionClassifier as RobustDiffusionClassifier
from .smoothing import DenoisedSmoothing as DenoisedSmoothing
