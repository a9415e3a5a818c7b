"""From a folder of images to a bundle, in the calls of the fastai course: python course.py IMAGES OUT [SIZE EPOCHS]"""

import sys

from fastai.vision.all import *

from cxr_fastai.all import *

path, out = Path(sys.argv[1]), Path(sys.argv[2])
size, epochs = (int(arg) for arg in sys.argv[3:5]) if len(sys.argv) > 3 else (224, 4)
out.mkdir(parents=True)

dls = CXRDataLoaders.from_folder(path, valid_pct=0.2, seed=42, size=size, bs=16)
dls.show_batch(max_n=4)

learn = cxr_learner(dls, 'baseline', cbs=[CSVLogger(), GradientAccumulation(32)], path=out)
suggested = learn.lr_find()
learn.fine_tune(epochs, suggested.valley, cbs=MixUp())
learn.add_cb(GradientClip(1.0))
learn.freeze_to(-1)
learn.fit_one_cycle(epochs, 1e-3)
learn.unfreeze()
save_best = SaveModelCallback(monitor='roc_auc', fname='best')
learn.to_bf16().fit(epochs, 1e-4, cbs=[save_best, ReduceLROnPlateau(patience=1), EarlyStoppingCallback(patience=3)])
learn.to_fp32()
learn.save('last')
learn.load('best')

print(learn.validate())
preds, targs = learn.get_preds()
tta_preds, _ = learn.tta(n=2)
learn.show_results(max_n=4)

interp = CXRInterpretation.from_learner(learn)
interp.plot_confusion_matrix()
interp.plot_top_losses(4)
print(interp.most_confused())
interp.print_classification_report()

learn.export('export.pkl')
image = get_image_files(path)[0]
print(load_learner(out / 'export.pkl').predict(image))

run = save_run(learn, out / 'run')
evaluate(run, split='valid')
print(report(run), export(run))
