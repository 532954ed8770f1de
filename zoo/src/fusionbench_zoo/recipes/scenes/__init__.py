"""resnet-mini: procedural rooms with everything known about every pixel, and a small ResNet that looks at them."""
