from .asking import ask_estimator as ask_estimator
from .attacks import ArtAttack as ArtAttack
from .networks import FeatureDenoisingClassifier as FeatureDenoisingClassifier
from .networks import RobustTrainer as RobustTrainer
from .preprocessing import without_preprocessing as without_preprocessing
from .rdc import RobustDiffusionClassifier as RobustDiffusionClassifier
from .smoothing import DenoisedSmoothing as DenoisedSmoothing
