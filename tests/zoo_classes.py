"""How many outputs the published models of a data set have."""

CLASSES = {'ImageNet-1k': 1000, 'Kinetics-400': 400, 'Something-Something v2': 174,
           'EPIC-KITCHENS-100': 3806, 'Breakfast': 10, 'COIN': 180, 'UC Merced': 21, 'AID': 30,
           'RESISC45': 45, 'ISIC 2017': 1, 'ISIC 2018': 1, 'Synapse': 9,
           'BraTS 2023': 4, 'ModelNet40': 40, 'ShapeNetPart': 50,
           **{f'ScanObjectNN {name}': 15 for name in ('OBJ_BG', 'OBJ_ONLY', 'PB_T50_RS')}}
