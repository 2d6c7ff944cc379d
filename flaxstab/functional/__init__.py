"""The stateless form of every layer: arrays in, arrays out, features last."""

from flaxstab.functional._activations import elu as elu
from flaxstab.functional._activations import gelu as gelu
from flaxstab.functional._activations import relu as relu
from flaxstab.functional._dropout import dropout as dropout
from flaxstab.functional._dropout import dropout_mask as dropout_mask
from flaxstab.functional._embedding import embedding as embedding
from flaxstab.functional._linear import conv as conv
from flaxstab.functional._linear import linear as linear
from flaxstab.functional._linear import padding_pairs as padding_pairs
from flaxstab.functional._losses import cross_entropy as cross_entropy
from flaxstab.functional._losses import l1_penalty as l1_penalty
from flaxstab.functional._losses import l2_penalty as l2_penalty
from flaxstab.functional._moments import Moments as Moments
from flaxstab.functional._moments import group_moments as group_moments
from flaxstab.functional._moments import moments as moments
from flaxstab.functional._norms import RunningStats as RunningStats
from flaxstab.functional._norms import batch_norm as batch_norm
from flaxstab.functional._norms import batch_norm_inference as batch_norm_inference
from flaxstab.functional._norms import group_norm as group_norm
from flaxstab.functional._norms import instance_norm as instance_norm
from flaxstab.functional._norms import layer_norm as layer_norm
from flaxstab.functional._norms import normalize as normalize
from flaxstab.functional._pooling import adaptive_avg_pool as adaptive_avg_pool
from flaxstab.functional._pooling import avg_pool as avg_pool
from flaxstab.functional._pooling import max_pool as max_pool
from flaxstab.functional._transposed import conv_transpose as conv_transpose
