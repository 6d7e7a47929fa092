"""What a run trains on, behind one face: the shards of a data folder, or data sets that are streamed.

Both kinds have the facts that a plan needs (vocab_size, n_tokens), those that go into the record (sha256) and into
checkpoints (tokenizer_file), the folder that the held-out loss reads (heldout), and the batches.
"""

from pathlib import Path

from curation.shards import file_names, manifest_sha256, open_stream, read_manifest, verify_files
from train.data import training_batches
from train.mixture import check_epochs, read_mixture
from train.stream import ENDLESS, PREFIX, PackedStream, open_recipe
from train.validate import check_heldout


def open_training_data(config, rank, world_size, verify):
    """Open what --data names. verify: read this rank's share of a folder's files and compare them with the manifest.

    Raises ValueError or FileNotFoundError, in one line, for data that cannot be trained on.
    """
    if config.data.startswith(PREFIX):
        return StreamedData(config)
    if config.tokenizer is not None:
        raise ValueError(f"--tokenizer is for --data {PREFIX}...; the data folder {config.data} has its own")
    manifest = read_manifest(config.data)
    if verify:
        verify_files(config.data, file_names(manifest)[rank::world_size])
    return FolderData(config, manifest)


class FolderData:
    """The training split of a data folder: as one stream, or by --mixture."""

    def __init__(self, config, manifest):
        self.seed, self.eval_every = config.seed, config.eval_every
        self.mixture = read_mixture(config.mixture, config.max_epochs, manifest)
        self.stream = open_stream(config.data, "train", self.mixture and self.mixture.sources)
        self.heldout, self.sha256 = config.data, manifest_sha256(config.data)
        self.tokenizer_file = Path(config.data) / manifest["tokenizer"]["file"]
        self.vocab_size, self.n_tokens = manifest["tokenizer"]["vocab_size"], self.stream.n_tokens

    def check(self, plan):
        """Lines to say about the data. Raises ValueError where it does not hold what the plan takes of it."""
        if self.eval_every:
            check_heldout(self.heldout, plan.model.seq_len)
        if not self.mixture:
            return []
        n_samples = plan.steps * plan.batch_sequences
        epochs = check_epochs(self.mixture, self.stream, plan.model.seq_len, self.seed, n_samples)
        return [self.mixture.describe(epochs)]

    def batches(self, plan, rank, world_size, first_step, device, checkpoint):
        return training_batches(self.stream, plan, self.seed, rank, world_size, first_step, device, self.mixture)

    def state(self):
        """What a checkpoint has to remember: nothing, the step says where the run is."""
        return {}


class StreamedData:
    """Data sets read and packed while training, by the recipe of --data stream:..."""

    def __init__(self, config):
        self.seed, self.eval_every = config.seed, config.eval_every
        self.recipe, self.tokenizer = open_recipe(config)
        self.heldout, self.sha256 = self.recipe.heldout, self.recipe.sha256
        self.tokenizer_file, self.vocab_size, self.n_tokens = self.tokenizer.path, self.tokenizer.vocab_size, ENDLESS

    def check(self, plan):
        """No lines; raises as FolderData does, and what a source that cannot be read raises."""
        if self.eval_every:
            check_heldout(self.heldout, plan.model.seq_len)
        self.packed = PackedStream(self.recipe, self.tokenizer, self.seed)
        return []

    def batches(self, plan, rank, world_size, first_step, device, checkpoint):
        if checkpoint:
            self.packed = PackedStream(self.recipe, self.tokenizer, self.seed, checkpoint.run["stream"])
        return self.packed.batches(plan, rank, world_size, device)

    def state(self):
        """The position in every source, for the checkpoint."""
        return {"stream": self.packed.state()}
