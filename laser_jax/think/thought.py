"""What a model thinks of a query, as plain data: `Inspector.think` gives a `Thought`.

K thinking steps, M segments of a written chain of thought, C documents. How it is shown is no
concern of this file.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from laser_jax.batch import Tokens
from laser_jax.config import Pooling, appended_thoughts
from laser_jax.data.buckets import Buckets
from laser_jax.data.documents import Document, EvalQuery
from laser_jax.data.prompts import PromptTokens
from laser_jax.data.tokenization import ExplicitTokens, PromptTokenizer, load_tokenizer, right_pad
from laser_jax.encoder import backbone_for, load_pretrained
from laser_jax.evaluate.beir import (
    BeirDataset,
    judged_split,
    read_corpus,
    read_qrels_file,
    read_queries,
)
from laser_jax.evaluate.metrics import Qrels
from laser_jax.inference.batch_encoder import LatentEncoder, NotFiniteError
from laser_jax.inference.retriever import LatentRetriever
from laser_jax.losses import normalize, pool
from laser_jax.modeling.backbone import Variables
from laser_jax.models.directory import model_directory
from laser_jax.thinking import TopTokens, top_tokens
from laser_jax.views import explicit_view, latent_view

PROGRAMS = 16
"""Compiled programs that are kept; beyond it the one that was used longest ago is given up."""


@dataclass(frozen=True)
class Token:
    """A token that a step may say next."""

    text: str
    probability: float


@dataclass(frozen=True)
class Step:
    """The next-token distribution at one state."""

    tokens: tuple[Token, ...]
    """The likeliest, in falling order."""
    entropy: float
    """The entropy of the whole distribution, in nats."""


@dataclass(frozen=True)
class Segment:
    """A segment of the written chain of thought, as the model read it: decoded tokens."""

    text: str
    cosine_K: tuple[float, ...]
    """The cosine of each step's state with the state at the segment's last token."""


@dataclass(frozen=True)
class RankedDocument:
    """A document, and where it stands after each step."""

    document: Document
    relevant: bool
    """Judged relevant to the query, with a grade above 0."""
    cosine_K: tuple[float, ...]
    """The cosine of the query's embedding after k steps with the document's."""
    rank_K: tuple[int, ...]
    """Among the whole corpus, from 1."""


@dataclass(frozen=True)
class Thought:
    """A query's K latent steps."""

    query: str
    instruction: str
    reasoning: str
    """The written chain of thought; "" without one."""
    pooling: Pooling
    steps: tuple[Step, ...]
    segments: tuple[Segment, ...]
    """In the order of reading, the closing EOS last where the model reads one; empty without a
    written chain of thought."""
    documents: tuple[RankedDocument, ...]
    """By the rank after the last step: all that are among the first `top_documents` after some
    step, and the best of the relevant ones wherever it stands. Empty without a corpus."""
    top_documents: int
    corpus_size: int
    """C; 0 without a corpus."""
    notices: tuple[str, ...]
    """What the reader must know: texts that were cut."""

    @property
    def best_relevant(self) -> RankedDocument | None:
        """The relevant document that ends first; None where none is judged."""
        return next((d for d in self.documents if d.relevant), None)


def load_corpus(directory: str | Path, *, ignore_identical_ids: bool = True) -> BeirDataset:
    """Reads a BEIR directory of which only `corpus.jsonl` is a must; judgements of all splits
    count. Raises as `evaluate.beir`."""
    directory = Path(directory)
    documents = read_corpus(directory)
    queries = read_queries(directory) if (directory / "queries.jsonl").is_file() else {}
    qrels: Qrels = {}
    for path in sorted((directory / "qrels").glob("*.tsv")):
        for query, grades in read_qrels_file(path).items():
            qrels.setdefault(query, {}).update(grades)
    judged = qrels or {query: {} for query in queries}
    counts = judged_split(directory, documents, queries, judged).unmatched if queries else ()
    return BeirDataset(documents, queries, qrels, counts, ignore_identical_ids)


def rank_documents(
    scores_KC: np.ndarray,
    documents: Sequence[Document],
    top: int,
    *,
    relevant: Collection[str] = (),
    excluded: Collection[str] = (),
) -> tuple[RankedDocument, ...]:
    """The documents that `Thought.documents` holds, from their cosines after each step; equal ones
    rank in the corpus's order. `relevant` and `excluded` are ids; excluded ones take no rank."""
    kept_C = np.array([document.id not in excluded for document in documents])
    scores_KC = np.where(kept_C, scores_KC, -np.inf)
    order_KC = np.argsort(-scores_KC, axis=1, kind="stable")
    rank_KC = np.argsort(order_KC, axis=1, kind="stable") + 1
    ranked = [
        RankedDocument(
            documents[c],
            documents[c].id in relevant,
            tuple(scores_KC[:, c].tolist()),
            tuple(rank_KC[:, c].tolist()),
        )
        for c in order_KC[-1]
        if kept_C[c]
    ]
    best = next((d for d in ranked if d.relevant), None)
    return tuple(d for d in ranked if min(d.rank_K) <= top or d is best)


class Inspector:
    """A model and a corpus, loaded and embedded once, to be asked about many queries.

    Documents are embedded with the model's own K, as in an index that is built once; a query is
    looked at after each of its steps. `instruction` is for queries that bring none: that of the
    corpus's first query with one, or "".
    """

    def __init__(
        self,
        retriever: LatentRetriever,
        corpus: BeirDataset | None,
        vectors_CD: np.ndarray,
        *,
        top_tokens: int,
        top_documents: int,
        variables: Variables | None = None,
    ) -> None:
        """Takes what is loaded; `load` loads it. Raises a ValueError where the vocabulary has fewer
        than `top_tokens`.

        Args:
            vectors_CD: float32 embeddings of the corpus's documents, in its order.
            top_tokens, top_documents: how many a step shows.
            variables: the weights, where they are not to be those of the retriever's encoder.
        """
        self.config = retriever.encoder.config
        most = self.config.backbone.vocab_size
        if top_tokens > most:
            raise ValueError(f"{top_tokens} tokens a step; the model's vocabulary has {most}")
        self._prompts = retriever.prompts
        self.corpus, self._vectors_CD = corpus, vectors_CD
        queries = [] if corpus is None else corpus.queries.values()
        given = (query.instruction for query in queries if query.instruction is not None)
        self.instruction = next(given, "")
        self._excluded = {} if corpus is None else corpus.exclusions()
        self._top_tokens, self._top_documents = top_tokens, top_documents
        self._variables = retriever.encoder.variables if variables is None else variables
        self._backbone = backbone_for(self.config, self._variables)
        self._width = Buckets().width  # the encoder's own
        # A `partial` for each shape: its program goes when it does.
        made = lru_cache(PROGRAMS)
        self._program = made(lambda function, *_, **fixed: jax.jit(partial(function, **fixed)))

    @classmethod
    def load(
        cls, model: str | Path, corpus: BeirDataset | None, *, top_tokens: int, top_documents: int
    ) -> Self:
        """Loads the model, by its directory or name, and embeds the corpus. Raises as
        `LatentRetriever.from_pretrained` and on too many `top_tokens`."""
        directory = model_directory(model)
        variables, config = load_pretrained(directory)
        prompts = PromptTokenizer(load_tokenizer(directory), config.prompt)
        retriever = LatentRetriever(LatentEncoder(variables, config), prompts)
        texts = [document.text for document in corpus.documents] if corpus else []
        vectors_CD = retriever.encode_document(texts, show_progress_bar=True)
        # layers in one stack compile faster, which is what a single query waits for
        shown = {"top_tokens": top_tokens, "top_documents": top_documents}
        return cls(retriever, corpus, vectors_CD, variables=jax.device_put(variables), **shown)

    def _latent_steps(
        self, variables: Variables, ids_BT: jax.Array, lengths_B: jax.Array, *, K: int
    ) -> tuple[jax.Array, jax.Array, TopTokens]:
        """Unit states and unit prefix embeddings, each [B, K, D], and what every state says."""
        tokens, pooling = Tokens(ids_BT, lengths_B), self.config.pooling
        hidden_BKD = latent_view(self._backbone, variables, tokens, K, pooling)
        prefixes_BKD = jnp.stack([pool(hidden_BKD[:, :k]) for k in range(1, K + 1)], axis=1)
        said = top_tokens(self._backbone, variables, hidden_BKD, self._top_tokens)
        return normalize(hidden_BKD), prefixes_BKD, said

    def _segment_states(
        self, variables: Variables, ids_BT: jax.Array, lengths_B: jax.Array, ends_BM: jax.Array
    ) -> jax.Array:
        """Unit states [B, M, D] of the explicit view at the positions `ends_BM`."""
        tokens = Tokens(ids_BT, lengths_B)
        return normalize(explicit_view(self._backbone, variables, tokens, ends_BM).keyframes_BKD)

    def known(self, text: str) -> EvalQuery:
        """The corpus's query with this text, or one with an empty id, and an instruction."""
        queries = [] if self.corpus is None else self.corpus.queries.values()
        query = next((query for query in queries if query.text == text), EvalQuery("", text))
        given = self.instruction if query.instruction is None else query.instruction
        return replace(query, instruction=given)

    def think(
        self,
        query: str,
        *,
        instruction: str | None = None,
        reasoning: str | None = None,
        num_thinking_steps: int | None = None,
    ) -> Thought:
        """Thinks about a query and looks at every step.

        A query with the text of one of the corpus's takes its instruction where that is None, its
        reasoning where that is None or blank, and its judged and excluded documents. Raises a
        NotFiniteError, and a ValueError on a blank query, a K below 1 or beyond the model's
        positions, or texts that leave no room in the prompt."""
        if not query.strip():
            raise ValueError("the query is empty; write what is to be found")
        known = self.known(query)
        instruction = (known.instruction or "") if instruction is None else instruction
        if reasoning is None or not reasoning.strip():
            reasoning = known.reasoning or ""
        K = self.config.num_thinking_steps if num_thinking_steps is None else num_thinking_steps
        prompt = self._prompts.query_prompt(query, instruction)
        states_KD, prefixes_KD, tokens = self._thoughts(prompt.ids, K)
        if not np.isfinite(prefixes_KD).all():
            raise NotFiniteError(f"the query {query!r:.60}", self.config.dtype)
        segments, reasoning_cut = (), False
        if reasoning.strip():
            explicit = self._prompts.explicit(query, instruction, reasoning)
            segments, reasoning_cut = self._segments(explicit, states_KD), explicit.truncated
        excluded, documents = self._excluded.get(known.id, ()), ()
        if self.corpus is not None:
            grades = self.corpus.qrels.get(known.id, {}).items()
            documents = rank_documents(
                prefixes_KD @ self._vectors_CD.T,
                self.corpus.documents,
                self._top_documents,
                relevant=[id_ for id_, grade in grades if grade > 0],
                excluded=excluded,
            )
        return Thought(
            query=query,
            instruction=instruction,
            reasoning=reasoning,
            pooling=self.config.pooling,
            steps=self._steps(tokens),
            segments=segments,
            documents=documents,
            top_documents=self._top_documents,
            corpus_size=len(self._vectors_CD),
            notices=self._notices(prompt, reasoning_cut, known.id, known.id in excluded),
        )

    def _notices(
        self, prompt: PromptTokens, reasoning_cut: bool, id_: str, is_own: bool
    ) -> tuple[str, ...]:
        limits = self.config.prompt
        notices = {
            f"The query was cut: it takes {prompt.whole_length} tokens, and "
            f"prompt.query_max_length is {limits.query_max_length}.": prompt.truncated,
            f"Document {id_!r} has the query's own id and is left out (BEIR's rule; "
            "ignore_identical_ids false keeps it).": is_own,
            "The written chain of thought was cut: with the query it takes more than "
            f"prompt.explicit_max_length, {limits.explicit_max_length} tokens.": reasoning_cut,
        }
        return tuple(text for text, holds in notices.items() if holds)

    def _thoughts(self, ids: list[int], K: int) -> tuple[np.ndarray, np.ndarray, TopTokens]:
        """What `_latent_steps` gives for one row: [K, D] twice and tokens [1, K, n]. No step sees
        a later one, so the program of the next power of two serves every K up to it."""
        self.config.backbone.require_positions(
            len(ids) + appended_thoughts(K, self.config.pooling),
            f"the query's {len(ids)} tokens and {K} thinking steps take",
            "take fewer steps, or shorten the query",
        )
        width, compiled_K = self._width(len(ids)), 1 << (K - 1).bit_length()
        program = self._program(self._latent_steps, width, K=compiled_K)
        found = program(self._variables, *right_pad([ids], self._prompts.pad_id, width))
        states, prefixes, tokens = jax.tree.map(lambda array: array[:, :K], jax.device_get(found))
        return states[0], prefixes[0], tokens

    def _steps(self, tokens: TopTokens) -> tuple[Step, ...]:
        decode = self._prompts.tokenizer.decode
        rows = (tokens.ids_BKn[0], tokens.probabilities_BKn[0], tokens.entropy_BK[0])
        steps = []
        for ids_n, probabilities_n, entropy in zip(*rows, strict=True):
            said = zip(ids_n, probabilities_n.tolist(), strict=True)
            steps.append(Step(tuple(Token(str(decode([i])), p) for i, p in said), float(entropy)))
        return tuple(steps)

    def _segments(self, explicit: ExplicitTokens, states_KD: np.ndarray) -> tuple[Segment, ...]:
        last = len(explicit.ids) - 1
        ends = sorted({*explicit.segment_ends, last})  # the explicit view itself is read at `last`
        widths = self._width(len(explicit.ids)), self._width(len(ends))
        rows = right_pad([explicit.ids], self._prompts.pad_id, widths[0])
        ends_BM, _ = right_pad([ends], last, widths[1])
        read = self._program(self._segment_states, *widths)(self._variables, *rows, ends_BM)
        cosine_MK = np.asarray(read)[0, : len(ends)] @ states_KD.T
        decode = self._prompts.tokenizer.decode
        starts = [explicit.query_length, *(end + 1 for end in ends[:-1])]
        return tuple(
            Segment(str(decode(explicit.ids[start : end + 1])), tuple(cosine_K.tolist()))
            for start, end, cosine_K in zip(starts, ends, cosine_MK, strict=True)
        )
