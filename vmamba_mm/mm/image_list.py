"""Images named in a list, in a folder for each class: ``type='vmamba_mm.ImageListDataset'``."""

from vmamba_mm.errors import UserError
from vmamba_mm.mm.compat import prepare_mm, require_working
from vmamba_mm.registry import DATASETS

prepare_mm()  # before mmpretrain, which some releases of transformers break
require_working('mmpretrain')

from mmengine.fileio import join_path, list_from_file  # noqa: E402
from mmpretrain.datasets import CustomDataset  # noqa: E402


@DATASETS.register_module()
class ImageListDataset(CustomDataset):
    """Images named in a list, whose folders are their classes.

    Each line of ``ann_file`` is a path below ``data_root/data_prefix`` whose first folder is the
    class, as ``airplane/airplane00.tif``: one folder of images, and a list for each part of them.

    Args:
        ann_file: the list, below ``data_root``.
        classes: names of the classes, in the order of their numbers.
        **kwargs: of mmpretrain's CustomDataset: ``data_root``, ``data_prefix``, ``pipeline``, ...

    Raises:
        UserError: on a line whose folder is none of the classes.
    """

    def load_data_list(self):
        infos, numbers = [], self.class_to_idx
        for number, line in enumerate(list_from_file(self.ann_file), 1):
            path = line.strip()
            if not path:
                continue
            name = path.partition('/')[0]
            if name not in numbers:
                raise UserError(
                    f'line {number} of {self.ann_file} is {line!r}: expected CLASS/FILE with one '
                    f'of the {len(numbers)} classes of the data set, {", ".join(list(numbers)[:5])}'
                    ', ...; change the line, or classes= of the data set')
            infos.append(dict(img_path=join_path(self.img_prefix, path), gt_label=numbers[name]))
        return infos
