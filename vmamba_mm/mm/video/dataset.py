"""Video files with their classes: ``type='vmamba_mm.VideoDataset'``."""

from collections.abc import Sequence

from vmamba_mm.errors import UserError
from vmamba_mm.mm.compat import prepare_mm, require_working
from vmamba_mm.mm.sources import VIDEO
from vmamba_mm.registry import DATASETS

prepare_mm()  # before mmpretrain, which some releases of transformers break
require_working('mmpretrain')

from mmengine.fileio import list_from_file  # noqa: E402
from mmpretrain.datasets import CustomDataset  # noqa: E402


@DATASETS.register_module()
class VideoDataset(CustomDataset):
    """Video files in a folder for each class, or named in a list.

    Folders: ``data_root/data_prefix/CLASS/*.mp4``; the classes are the folders in alphabetical
    order. List, as for Kinetics-400 and Something-Something v2: each line of ``ann_file`` is a path
    below ``data_root/data_prefix``, a separator and the number of the class, from 0 on::

        abseiling/0347ZoDXyP0_000095_000105.mp4 0

    Args:
        data_root, data_prefix, ann_file: where the files and the list are; ``ann_file`` is below
            ``data_root``, and '' for folders.
        with_label: whether there are classes.
        separator: between path and number, at its last place in the line; None for any space.
        extensions: of the files that are taken from folders.
        classes: names of the classes, or a file with one in each line.
        **kwargs: of mmpretrain's CustomDataset: ``pipeline``, ``metainfo``, ``test_mode``, ...

    Raises:
        UserError: on a line of the list that is not such.
    """

    source = VIDEO

    def __init__(self, data_root: str = '', data_prefix: str | dict = '', ann_file: str = '',
                 with_label: bool = True, separator: str | None = None,
                 extensions: Sequence[str] = VIDEO.suffixes, **kwargs):
        self.separator = separator
        super().__init__(data_root=data_root, data_prefix=data_prefix, ann_file=ann_file,
                         with_label=with_label, extensions=extensions, **kwargs)

    def load_data_list(self):
        if self.ann_file:
            return self._load_list()
        infos = super().load_data_list()
        for info in infos:
            info[VIDEO.path_key] = info.pop('img_path')
        return infos

    def _load_list(self):
        from mmengine.fileio import join_path

        infos, root = [], self.img_prefix
        for number, line in enumerate(list_from_file(self.ann_file), 1):
            line = line.strip()
            if not line:
                continue
            path, label = line, None
            if self.with_label:
                path, *rest = line.rsplit(self.separator, 1)
                label = rest[0].strip() if rest else ''
                if not label.isdigit() or not path.strip():
                    between = 'a space' if self.separator is None else repr(self.separator)
                    raise UserError(
                        f'line {number} of {self.ann_file} is {line!r}: expected the path of a '
                        f'video, {between} and the number of its class from 0 on; change the line, '
                        'or separator= of the data set')
            info = {VIDEO.path_key: join_path(root, path.strip()) if root else path.strip()}
            if label is not None:
                info['gt_label'] = int(label)
            infos.append(info)
        return infos
