"""What a job would take in time, memory and disk, measured on a sample of its own images."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What computing the features of a catalog would take."""

    num_images: int
    """Images of the catalog."""
    num_to_compute: int
    """Images that would go through the backbone; the others are there already or the same as another."""
    width: int
    """Numbers in a feature."""
    num_sampled: int
    """Images that were measured."""
    num_unreadable: int
    """Images of the sample that could not be read."""
    images_per_s: float
    """Rate once the job is under way; 0 if nothing is to be computed."""
    start_s: float
    """Seconds until then: hashing what has no hash, starting processes, choosing what computes."""
    time_s: float
    """Seconds for the whole job."""
    memory_bytes: int
    """Largest memory of this process and its workers; it does not grow with the number of images."""
    pixels_bytes: int
    """Of these, prepared images on their way."""
    disk_bytes: int
    """Size of the finished folder."""
    disk_peak_bytes: int
    """Most that is needed while it is made."""
    disk_free_bytes: int
    """What is free there now."""
    runtime: str
    """What would compute."""

    def __rich__(self) -> str:
        """What a person wants to know before starting."""
        if not self.num_to_compute:
            return f"nothing to compute: the features of all {self.num_images:,} images are there"
        lines = [
            f"[bold]{self.num_to_compute:,}[/bold] of {self.num_images:,} images to describe, "
            f"{self.width} numbers each (nothing was written)",
            f"  time    {_duration(self.time_s)} ({self.images_per_s:,.0f} images/s with {self.runtime}, "
            f"after {_duration(self.start_s)} to start)",
            f"  memory  {_size(self.memory_bytes)}, of it {_size(self.pixels_bytes)} for decoded images",
            f"  disk    {_size(self.disk_bytes)}, while it is made {_size(self.disk_peak_bytes)}; "
            f"{_size(self.disk_free_bytes)} are free",
            f"  measured on {self.num_sampled:,} images",
        ]
        if self.num_unreadable:
            lines.append(f"  [yellow]{self.num_unreadable:,} of these could not be read[/yellow]")
        if self.disk_peak_bytes > self.disk_free_bytes:
            lines.append("  [red]the disk is too small[/red]: choose another folder with -o")
        return "\n".join(lines)


def _duration(seconds: float | int) -> str:
    """Seconds as a person says them.

    >>> _duration(7.4), _duration(140), _duration(8000)
    ('7 s', '2 min 20 s', '2 h 13 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def _size(num_bytes: float | int) -> str:
    """Bytes as a person says them.

    >>> _size(512), _size(26_000_000), _size(3.2e9)
    ('1 kB', '26 MB', '3.2 GB')
    """
    if num_bytes < 1e6:
        return f"{max(1, round(num_bytes / 1e3))} kB"
    if num_bytes < 1e9:
        return f"{num_bytes / 1e6:.0f} MB"
    return f"{num_bytes / 1e9:,.1f} GB"
