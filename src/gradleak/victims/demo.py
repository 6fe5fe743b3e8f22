"""What `gradleak demo` captures: name of the victim, its settings, and the attacks that it is shown with."""

from gradleak.victims.play import CaptureAdapter, CaptureGradient

DEMO = {
    "adapter": (CaptureAdapter(model="convnet", target_modules="all"), ("map-inversion",)),
    "gradient": (CaptureGradient(), ("dlg", "idlg", "inverting-gradients")),
}
