//! SkyPilot's task files, planned and launched on any machine.
