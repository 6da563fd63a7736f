"""verdict.json: what the inference benchmark recommends."""

from pydantic import Field

from harness.run.storage import Json, JsonFile


class Recommendation(JsonFile):
    """verdict.json: which file to ship in which runtime under the benchmark's constraints (`asked`).

    `ship`: a row of inference_summary.csv, None where no arm meets the constraints; `tied`: arms not shown to be slower
    than the fastest; `reservation`: what could not be shown about it; `noise`: the interval of the reference against
    itself; `alpha`: error probability spent; `settled`: more replicates would not change what is tied.
    """

    id: str
    batch_size: int
    scope: str = ""
    latency: str = ""
    asked: str = ""
    noise: list[float] = Field(default_factory=list)
    ship: Json | None = None
    tied: list[str] = Field(default_factory=list)
    reservation: str = ""
    replicates: int = 0
    alpha: float = 0.05
    settled: bool = False
    sentence: str
    warnings: list[str] = Field(default_factory=list)
    environment: Json = Field(default_factory=dict)
