"""Models as data: the sizes from which parameters, memory and work follow.

Every size is from the model's published ``config.json``; ``source`` names the repository. A test
compares the number of parameters from the sizes with ``published_parameters``, their number in the
published weights. Both are equal.
"""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class GroupedQueryAttention:
    """Attention whose query heads share key and value heads.

    Attributes:
        num_heads: query heads.
        num_kv_heads: heads of keys and values.
        head_size: elements of a head.
        head_norms: whether queries and keys have a norm of their own.

    Source: Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models", 2023.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    head_norms: bool = False

    def parameters(self, hidden_size: int) -> int:
        """Parameters of a layer: projections of queries, keys, values and output, and norms."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        return hidden_size * heads * self.head_size + 2 * self.head_size * self.head_norms

    @property
    def kv_elements(self) -> int:
        """Elements that a layer caches for a token."""
        return 2 * self.num_kv_heads * self.head_size

    @property
    def flops_per_pair(self) -> int:
        """Operations for a query token and one that it attends to, for score and sum of values."""
        return 4 * self.num_heads * self.head_size


@dataclass(frozen=True)
class LatentAttention:
    """DeepSeek's multi-head latent attention. It caches one compressed vector a token.

    Attributes:
        num_heads: query heads.
        query_rank: elements of the compressed query.
        kv_rank: elements of the compressed keys and values.
        nope_size: elements of a query or key without position.
        rope_size: elements of one with position; all heads share the key's.
        value_size: elements of a value.

    Source: DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1.
    """

    num_heads: int
    query_rank: int
    kv_rank: int
    nope_size: int
    rope_size: int
    value_size: int

    def parameters(self, hidden_size: int) -> int:
        """Parameters of a layer: projections down and up, the output, and the norms between."""
        query = self.query_rank * (hidden_size + self.num_heads * (self.nope_size + self.rope_size))
        keys_and_values = hidden_size * (self.kv_rank + self.rope_size)
        keys_and_values += self.kv_rank * self.num_heads * (self.nope_size + self.value_size)
        output = self.num_heads * self.value_size * hidden_size
        return query + keys_and_values + output + self.query_rank + self.kv_rank

    @property
    def kv_elements(self) -> int:
        """Elements that a layer caches for a token."""
        return self.kv_rank + self.rope_size

    @property
    def flops_per_pair(self) -> int:
        """Work for a query token and a token that it attends to, in the compressed space."""
        return 2 * self.num_heads * (2 * self.kv_rank + self.rope_size)


@dataclass(frozen=True)
class Model:
    """A decoder of a language model. All layers except the first ``dense_layers`` are alike.

    Attributes:
        name: name of the model.
        num_hidden_layers: number of layers.
        hidden_size: elements of an activation.
        intermediate_size: elements inside the feed-forward part, or inside each expert.
        attention: the attention of every layer.
        vocab_size: rows of the embedding and of the head.
        tied_embeddings: whether the head is the embedding's own matrix.
        num_experts: experts of a layer; 0 if it has a plain feed-forward part.
        experts_per_token: number of experts that a token uses.
        shared_experts: further experts, which every token uses.
        dense_layers: number of layers at the start, which have no experts.
        dense_intermediate_size: elements inside their feed-forward part.
        norms_per_layer: norms of ``hidden_size`` elements in a layer.
        router_bias: whether the router has a bias for each expert.
        published_parameters: parameters in the published weights of these parts.
        source: source of the numbers.
    """

    name: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    attention: GroupedQueryAttention | LatentAttention
    vocab_size: int
    tied_embeddings: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    shared_experts: int = 0
    dense_layers: int = 0
    dense_intermediate_size: int = 0
    norms_per_layer: int = 2
    router_bias: bool = False
    published_parameters: int = 0
    source: str = ""

    @cached_property
    def embedding_parameters(self) -> int:
        """Parameters of the input embedding. The head's matrix has as many."""
        return self.vocab_size * self.hidden_size

    @cached_property
    def head_parameters(self) -> int:
        """Parameters of final norm and head. A stage must hold them even if they are tied."""
        return self.hidden_size + self.embedding_parameters

    @cached_property
    def _common_parameters(self) -> int:
        norms = self.norms_per_layer * self.hidden_size
        return self.attention.parameters(self.hidden_size) + norms

    @cached_property
    def _expert_parameters(self) -> int:
        return 3 * self.hidden_size * self.intermediate_size

    @cached_property
    def _dense_layer_parameters(self) -> int:
        size = self.dense_intermediate_size if self.num_experts else self.intermediate_size
        return self._common_parameters + 3 * self.hidden_size * size

    def _expert_layer_parameters(self, experts: float) -> float:
        """Parameters of a layer with experts, if ``experts`` of them count besides shared ones."""
        router = (self.hidden_size + self.router_bias) * self.num_experts
        experts_in_all = experts + self.shared_experts
        return self._common_parameters + router + experts_in_all * self._expert_parameters

    def dense_among(self, layers: range) -> int:
        """Number of the layers that have no experts."""
        first = self.dense_layers if self.num_experts else self.num_hidden_layers
        return max(0, min(layers.stop, first) - layers.start)

    def layer_parameters(self, layers: range, experts: float | None = None) -> float:
        """Parameters of some layers.

        Args:
            layers: the layers.
            experts: experts of a layer that count, besides the shared ones; None for all.
        """
        dense = self.dense_among(layers)
        counted = self.num_experts if experts is None else experts
        with_experts = (len(layers) - dense) * self._expert_layer_parameters(counted)
        return dense * self._dense_layer_parameters + with_experts

    def experts_touched(self, tokens: float) -> float:
        """Mean number of experts of a layer that a batch uses, if tokens draw them at random.

        A token misses an expert with probability ``1 - experts_per_token / num_experts``. All
        tokens miss it with this probability to the power ``tokens``.
        """
        if not self.num_experts:
            return 0.0
        missed: float = (1 - self.experts_per_token / self.num_experts) ** tokens
        return self.num_experts * (1 - missed)

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, each counted once."""
        ends = self.head_parameters + (0 if self.tied_embeddings else self.embedding_parameters)
        return round(self.layer_parameters(range(self.num_hidden_layers))) + ends

    @property
    def weights(self) -> list[float]:
        """Parameters of the embedding, each layer, and norm and head, as weights for the rules."""
        layers = [self.layer_parameters(range(i, i + 1)) for i in range(self.num_hidden_layers)]
        return [self.embedding_parameters, *layers, self.head_parameters]
