"""The baseline of AttnGAN: one iteration as public code writes it.

Eager float32 in contiguous NCHW: packed sequences for the LSTM, a loop over captions for the
matching of words, one backward pass and optimizer for each discriminator. The encoders learn
first, as the engine has it without encoders of another run. Written from what
AttnGAN does, on networks of the sizes that the engine trains, and from nothing else of the engine.

Shapes: N batch, C channels, H height, W width, T words, D features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.plain import entropy
from bench.plain_translation import frozen

GAMMA = (4.0, 5.0, 10.0)


class Reader(nn.Module):
    """torch's LSTM on packed captions, with the weights of an encoder of the engine."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        state, (vector, gates) = text.state_2HG, text.input_2EG.shape[1:]
        self.vectors, self.dropout = text.vectors, text.dropout
        self.lstm = nn.LSTM(vector, gates // 4, batch_first=True, bidirectional=True)
        parts = {"weight_ih": text.input_2EG, "weight_hh": state, "bias_ih": text.bias_21G}
        with torch.no_grad():
            for way, suffix in enumerate(("", "_reverse")):
                for name, weight in parts.items():
                    own = getattr(self.lstm, f"{name}_l0{suffix}")
                    own.copy_(weight[way].T.reshape(own.shape))
                # one bias is enough, and the engine's encoder has but one
                getattr(self.lstm, f"bias_hh_l0{suffix}").zero_().requires_grad_(False)

    def drop(self, vectors: Tensor) -> Tensor:
        """Dropout of words' vectors (N, T, E)."""
        return F.dropout(vectors, self.dropout)

    def forward(self, tokens: Tensor, lengths: Tensor, dropping: bool) -> tuple[Tensor, Tensor]:
        """Features of words (N, T, D) and of captions (N, D)."""
        vectors = self.vectors(tokens)
        given = nn.utils.rnn.pack_padded_sequence(
            self.drop(vectors) if dropping else vectors,
            lengths.cpu(),
            batch_first=True,
            enforce_sorted=False,
        )
        found, (last, _) = self.lstm(given)
        size = tokens.shape[1]
        words, _ = nn.utils.rnn.pad_packed_sequence(found, batch_first=True, total_length=size)
        return words, last.transpose(0, 1).reshape(len(tokens), -1)


@dataclass
class PlainText:
    """Generator, discriminators, encoders and optimizers, one for each discriminator."""

    generator: nn.Module
    discriminators: nn.Module
    reader: Reader
    image: nn.Module
    optimizer_g: torch.optim.Optimizer
    optimizers_d: list[torch.optim.Optimizer]
    optimizer_e: torch.optim.Optimizer
    matching: float
    clip: float
    latent: int

    def noise(self, real: Tensor) -> Tensor:
        """Latent vectors, (N, L)."""
        return torch.randn(len(real), self.latent, device=real.device)

    def encode(self, real: Tensor, tokens: Tensor, *told: Tensor) -> Tensor:
        """Update the encoders; their loss."""
        self.optimizer_e.zero_grad()
        loss = self.match(real, *self.reader(tokens, told[0], True), *told)
        loss.backward()
        learning = [p for group in self.optimizer_e.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(learning, self.clip)
        self.optimizer_e.step()
        return loss.detach()

    def word_scores(self, regions: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
        """(N, N), caption by caption."""
        count, columns = len(words), []
        for i, length in enumerate(lengths.tolist()):
            word = words[i, :length].expand(count, -1, -1)
            share = torch.bmm(word, regions).softmax(1)
            weight = (GAMMA[0] * share).softmax(2)
            seen = torch.bmm(weight, regions.transpose(1, 2))
            alike = F.cosine_similarity(word, seen, dim=2)
            columns.append((GAMMA[1] * alike).exp().sum(1).log())
        return torch.stack(columns, 1)

    def match(self, image: Tensor, words: Tensor, sentence: Tensor, *told: Tensor) -> Tensor:
        """The losses of words and of captions; told: lengths and classes."""
        lengths, labels = told
        regions, whole = self.image(image)
        alike = F.normalize(whole) @ F.normalize(sentence).T
        own, loss = torch.arange(len(labels), device=labels.device), 0.0
        same = (labels[:, None] == labels) & (own[:, None] != own)
        for scores in (self.word_scores(regions.flatten(2), words, lengths), alike):
            logits = (GAMMA[2] * scores).masked_fill(same, -float("inf"))
            loss = loss + F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)
        return loss

    def iteration(
        self, real: Tensor, labels: Tensor, tokens: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Update encoders, discriminators and generator; the losses of the second, of the last, of
        the first."""
        loss_e, z = self.encode(real, tokens, lengths, labels), self.noise(real)
        with torch.no_grad():
            words, sentence = self.reader(tokens, lengths, False)
        mean, log_variance = self.generator.condition(sentence)
        noise, drawn = z.split([z.shape[1] - mean.shape[1], mean.shape[1]], 1)
        condition = mean + drawn * (0.5 * log_variance).exp()
        images, _ = self.generator(noise, condition, words, lengths)
        loss_d = self.judge(real, images, sentence)
        frozen(self.discriminators, True)
        frozen(self.image, True)
        self.image.eval()
        self.optimizer_g.zero_grad()
        loss_g = self.matching * self.match(images[-1], words, sentence, lengths, labels)
        loss_g = loss_g - 0.5 * (1 + log_variance - mean**2 - log_variance.exp()).mean()
        for judge, image in zip(self.discriminators.of_size, images, strict=True):
            seen = judge.features(image)
            loss_g = loss_g + entropy(judge.alone(seen), 1.0)
            loss_g = loss_g + entropy(judge.with_caption(seen, sentence), 1.0)
        loss_g.backward()
        self.optimizer_g.step()
        frozen(self.discriminators, False)
        frozen(self.image, False)
        self.image.train()
        return loss_d, loss_g.detach(), loss_e

    def judge(self, real: Tensor, images: list[Tensor], sentence: Tensor) -> Tensor:
        """Update the discriminators one by one; the sum of their losses."""
        wrong, total = sentence.roll(-1, 0), torch.zeros(())
        judges = self.discriminators.of_size
        for judge, image, optimizer in zip(judges, images, self.optimizers_d, strict=True):
            optimizer.zero_grad()
            small = F.interpolate(real, image.shape[2:], mode="area")
            seen, made = judge.features(small), judge.features(image.detach())
            loss = entropy(judge.alone(seen), 1.0)
            loss = loss + entropy(judge.with_caption(seen, sentence), 1.0)
            loss = loss / 2 + entropy(judge.alone(made), 0.0) / 3
            loss = loss + entropy(judge.with_caption(made, sentence), 0.0) / 3
            loss = loss + entropy(judge.with_caption(seen, wrong), 0.0) / 3
            loss.backward()
            optimizer.step()
            total = total + loss.detach()
        return total
