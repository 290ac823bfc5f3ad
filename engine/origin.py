"""What does a generated picture say of where it comes from? Text that travels inside the file.

The mark is the one that IPTC gives for it and that Google, Meta and Adobe read: the property
DigitalSourceType (IPTC Photo Metadata Standard 2023.1, Extension schema), as XMP. Plain text keys
beside it are for people and scripts.
"""

from dataclasses import dataclass
from xml.sax.saxutils import escape

from PIL import PngImagePlugin

SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
GENERATED, COMPOSITE = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"

XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:dc="http://purl.org/dc/elements/1.1/"
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
   <xmp:CreatorTool>Saddle</xmp:CreatorTool>
   <Iptc4xmpExt:DigitalSourceType>{source}</Iptc4xmpExt:DigitalSourceType>
   <dc:description><rdf:Alt><rdf:li xml:lang="x-default">{text}</rdf:li></rdf:Alt></dc:description>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""


@dataclass(frozen=True)
class Origin:
    """Where a generated picture comes from."""

    recipe: str
    """Name of the recipe."""
    checkpoint: str
    """SHA-256 of the checkpoint's index; of a picture drawn while training, run and moment."""
    seed: int
    """Seed of the latents."""
    images: int
    """Images that the networks had been trained on."""
    number: int | None = None
    """Which image of the seed it is, of a file that holds a single one."""
    composite: bool = False
    """It shows images of the dataset as well."""

    def text(self) -> dict[str, str]:
        """Key and value of every statement."""
        statements = {
            "Software": "Saddle",
            "Generated": "true",
            "DigitalSourceType": SOURCE_TYPES + (COMPOSITE if self.composite else GENERATED),
            "Saddle recipe": self.recipe,
            "Saddle checkpoint": self.checkpoint,
            "Saddle seed": str(self.seed),
            "Saddle images seen": str(self.images),
        }
        if self.number is not None:
            statements["Saddle image"] = str(self.number)
        return statements

    def xmp(self) -> bytes:
        """The same as an XMP packet."""
        statements = self.text()
        text = "; ".join(f"{k}: {v}" for k, v in statements.items() if k != "DigitalSourceType")
        return XMP.format(source=statements["DigitalSourceType"], text=escape(text)).encode()

    def options(self, suffix: str) -> dict[str, object]:
        """What Pillow's `save` is given to put it into a file of that format."""
        if suffix == ".png":
            chunks = PngImagePlugin.PngInfo()
            for key, value in self.text().items():
                chunks.add_text(key, value)
            chunks.add_itxt("XML:com.adobe.xmp", self.xmp().decode())
            return {"pnginfo": chunks}
        if suffix == ".gif":  # Pillow writes no XMP there
            return {"comment": "\n".join(f"{k}: {v}" for k, v in self.text().items()).encode()}
        if suffix in (".jpg", ".jpeg", ".webp"):
            return {"xmp": self.xmp()}
        return {}
