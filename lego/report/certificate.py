"""The certificate of a run: what it promises, in sentences, and what that follows from."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lego.certificate import FILE_NAME, Certificate, load_certificate
from lego.certify import promise
from lego.report.cells import Cell, Table, number, percent, plain, significant


class CertificateSection(NamedTuple):
    """Sentences, the entries of the certificate, and every threshold that was tested."""

    sentences: list[str]
    entries: Table
    grid: Table


def certificate_section(checkpoint: Path) -> CertificateSection | None:
    """What the certificate of a checkpoint folder says; None if there is none.

    Raises: ValueError if it is damaged or of another model.
    """
    if not (checkpoint / FILE_NAME).is_file():
        return None
    found = load_certificate(checkpoint)
    return CertificateSection(promise(found), _entries(found), _grid(found))


def _entries(found: Certificate) -> Table:
    unit = "nats a token" if found.loss_bound is not None else "of the tokens"
    rows = [
        ("risk", plain(found.risk)),
        ("epsilon", plain(found.epsilon)),
        ("delta", plain(found.delta)),
        ("a risk of 1 is", Cell(f"{found.loss_bound or 'all'} {unit}", words=True)),
        ("threshold", plain(found.threshold)),
        ("criterion", plain(found.criterion)),
        ("KV policy", plain(found.kv_policy)),
        ("sequences", plain(found.num_sequences)),
        ("documents", plain(found.num_documents)),
        ("prompt tokens", plain(found.prompt_tokens)),
        ("new tokens", plain(found.max_new_tokens)),
        ("engine", plain(found.engine)),
        ("model SHA-256", plain(found.model_sha256)),
        ("data SHA-256", plain(found.data_sha256)),
    ]
    return Table(caption="The certificate", columns=("entry", "value"), rows=rows)


def _grid(found: Certificate) -> Table:
    """From the safest threshold on; the first p-value above delta ends the test."""
    return Table(
        caption="Thresholds tested",
        columns=("threshold", "shallow", "mean risk", "p-value"),
        rows=[
            (
                f"{entry.threshold:.4g}",
                percent(entry.shallow_ratio),
                number(entry.mean_risk, 4),
                significant(entry.p_value),
            )
            for entry in found.grid
        ],
        note=f"A threshold passes while no p-value so far is above {found.delta:g}.",
    )
