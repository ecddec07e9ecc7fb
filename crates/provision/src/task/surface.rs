//! SkyPilot's task file as a table of shapes, and which of its fields Updraft acts on.

use super::schema::Shape::{
    Any, Boolean, Choice, Either, Fields, Integer, List, MapOf, Minutes, Null, Number, Size, Text,
};
use super::schema::{Shape, field, refused, required};

const MANY: usize = usize::MAX;
const COUNT: Shape = Integer(0, i64::MAX);
const POSITIVE: Shape = Integer(1, i64::MAX);
const WHOLE: Shape = Integer(i64::MIN, i64::MAX);
const REAL: Shape = Number(f64::NEG_INFINITY);
const MAPPING: Shape = MapOf(MANY, &Either(&[Any, Null]));
const LABELS: Shape = MapOf(MANY, &Text);
const TEXT_OR_NUMBER: Shape = Either(&[Text, REAL]);
/// An environment value may be any scalar: it becomes text.
const SCALAR: Shape = Either(&[Text, REAL, Boolean, Null]);

/// The clouds a task may name: SkyPilot's, and `local`, which is this machine.
pub(crate) const CLOUDS: &[&str] = &[
    "aws",
    "azure",
    "gcp",
    "ibm",
    "lambda",
    "scp",
    "oci",
    "kubernetes",
    "runpod",
    "vast",
    "vsphere",
    "cudo",
    "fluidstack",
    "paperspace",
    "primeintellect",
    "do",
    "nebius",
    "ssh",
    "slurm",
    "hyperbolic",
    "seeweb",
    "shadeform",
    "yotta",
    "mithril",
    "verda",
    "local",
    "fake",
];

/// One task.
pub(crate) const TASK: Shape = Fields(&[
    field("name", Text),
    field(
        "workdir",
        Either(&[Text, Fields(&[required("url", Text), field("ref", Text)])]),
    ),
    field("setup", Text),
    field("run", Text),
    field("envs", MapOf(MANY, &SCALAR)),
    field("secrets", Either(&[MapOf(MANY, &SCALAR), List(0, &Text)])),
    field("resources", RESOURCES),
    field("num_nodes", POSITIVE),
    field("file_mounts", MapOf(MANY, &Either(&[Text, STORAGE]))),
    field("service", SERVICE),
    field("inputs", MapOf(1, &REAL)),
    refused("outputs", MapOf(1, &REAL)),
    refused("config", CONFIG),
    refused("volumes", MAPPING),
    refused("volume_mounts", List(0, &VOLUME_MOUNT)),
    refused("pool", MAPPING),
    refused("event_callback", Text),
    refused(
        "managed_secrets",
        List(0, &Either(&[Text, MapOf(1, &MANAGED_SECRET)])),
    ),
    refused("file_mounts_mapping", MAPPING),
    refused("api_server_access", Boolean),
    refused("_metadata", MAPPING),
]);

const MANAGED_SECRET: Shape = Fields(&[refused("mount_path", Text)]);

const VOLUME_MOUNT: Shape = Fields(&[
    refused("path", Text),
    refused("volume_name", Text),
    refused("is_ephemeral", Boolean),
    refused("sub_path", Text),
    refused("volume_config", MAPPING),
]);

/// What may be said of one machine: everything of `resources`, with `$more` where it may have
/// alternatives.
macro_rules! machine {
    ($accelerators:expr, [$($more:expr),*]) => {
        Fields(&[
            field("cloud", Choice(CLOUDS)),
            field("region", Text),
            field("zone", Text),
            field("infra", Text),
            field("cpus", TEXT_OR_NUMBER),
            field("memory", TEXT_OR_NUMBER),
            field("accelerators", $accelerators),
            field("gpus", $accelerators),
            field("instance_type", Text),
            field("use_spot", Boolean),
            field("disk_size", Size),
            field("max_hourly_cost", Number(f64::MIN_POSITIVE)),
            field("ports", PORTS),
            field("labels", LABELS),
            field("autostop", AUTOSTOP),
            $($more,)*
            refused("job_recovery", RECOVERY),
            refused("volumes", List(0, &MAPPING)),
            refused("ephemeral_storage", Size),
            refused("disk_tier", DISK_TIER),
            refused("network_tier", NETWORK_TIER),
            refused("local_disk", Text),
            refused("accelerator_args", ACCELERATOR_ARGS),
            refused("image_id", IMAGE),
            refused("priority", PRIORITY),
            refused("priority_class", Text),
            refused("_no_missing_accel_warnings", Boolean),
            refused("_docker_login_config", MAPPING),
            refused("_is_image_managed", Boolean),
            refused("_requires_fuse", Boolean),
            refused("_cluster_config_overrides", MAPPING),
        ])
    };
}

const RESOURCES: Shape = machine!(
    ACCELERATORS,
    [
        field("any_of", List(0, &CANDIDATE)),
        field("ordered", List(0, &CANDIDATE))
    ]
);

/// An entry of `any_of` or `ordered`.
const CANDIDATE: Shape = machine!(ONE_ACCELERATOR, []);

const ACCELERATORS: Shape = Either(&[Text, MapOf(MANY, &Either(&[REAL, Null])), List(0, &Text)]);
const ONE_ACCELERATOR: Shape = Either(&[Text, MapOf(1, &REAL)]);
const PORTS: Shape = Either(&[Text, WHOLE, List(0, &Either(&[Text, WHOLE]))]);
const DISK_TIER: Shape = Choice(&["low", "medium", "high", "ultra", "best", "none"]);
const NETWORK_TIER: Shape = Choice(&["standard", "best"]);
const IMAGE: Shape = Either(&[Text, MAPPING]);
const PRIORITY: Shape = Integer(-1000, 1000);
const EXIT_CODE: Shape = Integer(0, 255);

const RECOVERY: Shape = Either(&[
    Text,
    Fields(&[
        refused("strategy", Text),
        refused("max_restarts_on_errors", COUNT),
        refused(
            "recover_on_exit_codes",
            Either(&[EXIT_CODE, List(0, &EXIT_CODE)]),
        ),
    ]),
]);

const ACCELERATOR_ARGS: Shape = Fields(&[
    refused("runtime_version", Text),
    refused("tpu_name", Text),
    refused("tpu_vm", Boolean),
    refused("gcp_queued_resource", Boolean),
]);

const AUTOSTOP: Shape = Either(&[
    Boolean,
    Minutes,
    Fields(&[
        field("idle_minutes", COUNT),
        field("down", Boolean),
        field("wait_for", Choice(&["jobs_and_ssh", "jobs", "none"])),
        refused("hook", Text),
        refused("hook_timeout", POSITIVE),
    ]),
]);

const RCLONE: Shape = Text;
const STORAGE: Shape = Fields(&[
    refused("name", Text),
    field("source", Either(&[Text, List(1, &Text)])),
    field(
        "store",
        Choice(&[
            "S3",
            "GCS",
            "AZURE",
            "R2",
            "IBM",
            "OCI",
            "NEBIUS",
            "COREWEAVE",
            "VASTDATA",
            "TIGRIS",
            "HF",
            "VOLUME",
        ]),
    ),
    refused("persistent", Boolean),
    field("mode", Choice(&["MOUNT", "COPY", "MOUNT_CACHED"])),
    refused("type", Choice(&["DIR", "FILE"])),
    refused(
        "config",
        Fields(&[
            refused("disk_size", Size),
            refused("disk_tier", Text),
            refused("storage_type", Text),
            refused("attach_mode", Text),
            refused(
                "mount_cached",
                Fields(&[
                    refused("transfers", POSITIVE),
                    refused("buffer_size", RCLONE),
                    refused("vfs_cache_max_size", RCLONE),
                    refused("vfs_cache_max_age", RCLONE),
                    refused("vfs_read_ahead", RCLONE),
                    refused("vfs_read_chunk_size", RCLONE),
                    refused("vfs_read_chunk_streams", COUNT),
                    refused("vfs_write_back", RCLONE),
                    refused("read_only", Boolean),
                ]),
            ),
            refused(
                "mount",
                Fields(&[
                    refused("read_only", Boolean),
                    refused("hf_mount_args", List(0, &Text)),
                ]),
            ),
        ]),
    ),
    refused("_is_sky_managed", Boolean),
    refused("_bucket_sub_path", Text),
    refused("_force_delete", Boolean),
]);

const SERVICE: Shape = Fields(&[
    field(
        "readiness_probe",
        Either(&[
            Text,
            Fields(&[
                required("path", Text),
                field("initial_delay_seconds", REAL),
                field("timeout_seconds", REAL),
                field("endpoint_probe_interval_seconds", REAL),
                field("consecutive_failure_threshold_timeout", REAL),
                field("post_data", Either(&[Text, MAPPING])),
                field("headers", LABELS),
            ]),
        ]),
    ),
    field("replicas", WHOLE),
    field("ports", WHOLE),
    field(
        "load_balancing_policy",
        Choice(&["round_robin", "least_load", "instance_aware_least_load"]),
    ),
    field(
        "load_balancer",
        Fields(&[field("stream_timeout_seconds", REAL)]),
    ),
    field("replica_policy", REPLICA_POLICY),
    refused("workers", WHOLE),
    refused("pool", POOL),
    refused(
        "tls",
        Fields(&[required("keyfile", Text), required("certfile", Text)]),
    ),
]);

const REPLICA_POLICY: Shape = Fields(&[
    required("min_replicas", COUNT),
    field("max_replicas", COUNT),
    refused("num_overprovision", COUNT),
    refused(
        "target_qps_per_replica",
        Either(&[Number(0.0), MapOf(MANY, &Number(0.0))]),
    ),
    refused("dynamic_ondemand_fallback", Boolean),
    refused("base_ondemand_fallback_replicas", COUNT),
    refused("spot_placer", Choice(&["dynamic_fallback"])),
    refused("upscale_delay_seconds", REAL),
    refused("downscale_delay_seconds", REAL),
]);

const POOL: Shape = Fields(&[
    refused("workers", COUNT),
    refused("min_workers", COUNT),
    refused("max_workers", COUNT),
    refused("queue_length_threshold", POSITIVE),
    refused("upscale_delay_seconds", Number(0.0)),
    refused("downscale_delay_seconds", Number(0.0)),
]);

/// What a task may override of SkyPilot's own configuration; all of it belongs to clouds that
/// Updraft does not drive.
const CONFIG: Shape = Fields(&[
    refused(
        "docker",
        Fields(&[refused("run_options", Either(&[Text, List(0, &Text)]))]),
    ),
    refused("nvidia_gpus", Fields(&[refused("disable_ecc", Boolean)])),
    refused("ssh", CLUSTER),
    refused("kubernetes", CLUSTER),
    refused(
        "azure",
        Fields(&[refused("remote_identity", Any), refused("vpc_name", Any)]),
    ),
    refused(
        "gcp",
        Fields(&[
            refused("vpc_name", Any),
            refused("subnet_names", Any),
            refused("managed_instance_group", MAPPING),
            refused("enable_gvnic", Boolean),
            refused("enable_gpu_direct", Boolean),
            refused("placement_policy", Text),
        ]),
    ),
    refused(
        "vast",
        Fields(&[
            refused("datacenter_only", Boolean),
            refused("create_instance_kwargs", MAPPING),
        ]),
    ),
    refused(
        "slurm",
        Fields(&[
            refused("sbatch_options", MAPPING),
            refused("quota", Any),
            refused("cpu_partition", Any),
        ]),
    ),
    refused("active_workspace", Text),
    refused(
        "hooks",
        List(
            0,
            &Fields(&[
                required("run", Text),
                refused("events", List(1, &Choice(&["stop", "preemption", "down"]))),
                refused("timeout", POSITIVE),
            ]),
        ),
    ),
]);

const CLUSTER: Shape = Fields(&[
    refused("custom_metadata", MAPPING),
    refused("pod_config", MAPPING),
    refused("provision_timeout", WHOLE),
    refused("dws", MAPPING),
    refused("kueue", MAPPING),
    refused("quota", Any),
    refused("remote_identity", Any),
    refused("enable_docker", Any),
    refused("set_pod_resource_limits", Any),
]);

/// Whether every key of a document makes it the header of a pipeline, not a task.
pub(crate) fn is_header(names: &[String]) -> bool {
    let is = |wanted: &[&str]| {
        names.len() == wanted.len() && wanted.iter().all(|w| names.iter().any(|n| n == w))
    };
    is(&["name"]) || is(&["name", "execution"])
}
