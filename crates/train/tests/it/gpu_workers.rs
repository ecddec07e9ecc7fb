//! Workers that add up their gradients on their GPUs: emulators here, which hand each other numbers through messages where
//! NCCL would.

use std::thread;

use candle_core::DType;
use updraft_kernels::cuda::{View, ViewMut};
use updraft_model::{Error as ModelError, Gpu};
use updraft_train::{
    Collective, DeviceCollective, DeviceGroup, LocalCollective, MAX_MESSAGE, Result, StepRecord,
    TrainConfig, Trainer, local_group,
};

use crate::gpu::on_gpu;
use crate::world::{adapter, config, source};

/// What NCCL does, in messages.
#[derive(Debug)]
struct Messages(LocalCollective);

impl DeviceGroup for Messages {
    fn all_gather(
        &mut self,
        gpu: &Gpu,
        mine: View<'_, f32>,
        all: &mut ViewMut<'_, f32>,
    ) -> Result<()> {
        let mine = gpu.download(mine).map_err(ModelError::from)?;
        let mut gathered = vec![Vec::new(); self.0.num_workers()];
        for piece in mine.chunks(MAX_MESSAGE / 4) {
            let bytes: Vec<u8> = piece.iter().flat_map(|value| value.to_le_bytes()).collect();
            for (gathered, bytes) in gathered.iter_mut().zip(self.0.exchange(&bytes)?) {
                let (values, _) = bytes.as_chunks::<4>();
                gathered.extend(values.iter().map(|&value| f32::from_le_bytes(value)));
            }
        }
        let gathered = gpu.upload(&gathered.concat()).map_err(ModelError::from)?;
        Ok(gpu
            .copy(gathered.view(), &all.reborrow())
            .map_err(ModelError::from)?)
    }
}

type Worker = DeviceCollective<LocalCollective, Messages>;

fn group(num_workers: usize) -> Vec<Worker> {
    let groups = local_group(num_workers)
        .into_iter()
        .zip(local_group(num_workers));
    let worker = |(host, group)| DeviceCollective::new(host, Messages(group));
    groups.map(worker).collect()
}

updraft_train::collective_tests!(super::group);

fn together<C: Collective, R: Send>(workers: Vec<C>, work: impl Fn(C) -> R + Sync) -> Vec<R> {
    let work = &work;
    thread::scope(|scope| {
        let running: Vec<_> = workers
            .into_iter()
            .map(|worker| scope.spawn(move || work(worker)))
            .collect();
        let ends = running.into_iter().map(thread::ScopedJoinHandle::join);
        ends.map(|end| end.expect("no worker panics")).collect()
    })
}

/// Numbers whose sum depends on the order in which they are added.
fn numbers(rank: usize, len: usize) -> Vec<f32> {
    let number =
        |i: usize| ((i * 31 + rank * 17) % 101) as f32 * 10.0_f32.powi(rank as i32 * 3 - 4) - 2.0;
    (0..len).map(number).collect()
}

#[test]
fn gpu_sums_have_the_hosts_bits() {
    for num_workers in [1, 2, 3, 5] {
        for len in [0, 1, 7, 4099] {
            let expected = together(local_group(num_workers), |mut worker| {
                let mut values = numbers(worker.rank(), len);
                worker.sum(&mut values).expect("all are there");
                values
            });
            let sums = together(group(num_workers), |mut worker| {
                let gpu = Gpu::emulated();
                let mut values = gpu.upload(&numbers(worker.rank(), len)).expect("memory");
                let power = worker.on_gpu().expect("the power");
                power
                    .sum_on_gpu(&gpu, &mut values.view_mut())
                    .expect("all are there");
                gpu.download(values.view()).expect("finished")
            });
            let bits = |sums: &[f32]| sums.iter().map(|sum| sum.to_bits()).collect::<Vec<_>>();
            for sum in &sums {
                assert_eq!(
                    bits(sum),
                    bits(&expected[0]),
                    "{num_workers} workers, {len}"
                );
            }
        }
    }
}

/// A host through which no sum goes.
#[derive(Debug)]
struct Talk(LocalCollective);

impl Collective for Talk {
    fn rank(&self) -> usize {
        self.0.rank()
    }
    fn num_workers(&self) -> usize {
        self.0.num_workers()
    }
    fn exchange(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.0.exchange(mine)
    }
    fn sum(&mut self, _: &mut [f32]) -> Result<()> {
        panic!("the GPUs add up")
    }
}

/// Two steps of a run.
fn life(worker: impl Collective, config: &TrainConfig) -> (Vec<StepRecord>, Vec<u32>) {
    let gpu = Gpu::emulated();
    let (decoder, source) = (on_gpu(DType::F32, &gpu), source(12));
    let mut trainer = Trainer::new(&decoder, adapter(), &source, config.clone())
        .expect("a run")
        .with_workers(worker);
    trainer.run_until(2).expect("two steps");
    let (adapter, log) = trainer.into_parts();
    let values = adapter.values().expect("readable");
    (log, values.iter().map(|value| value.to_bits()).collect())
}

#[test]
fn gpu_runs_end_with_the_bits_of_the_hosts_sums() {
    let config = TrainConfig {
        gradient_accumulation_steps: 3,
        per_device_train_batch_size: 2,
        warmup_steps: 0,
        ..config()
    };
    let groups = local_group(2).into_iter().zip(local_group(2));
    let groups = groups.map(|(host, group)| DeviceCollective::new(Talk(host), Messages(group)));
    let on_gpus = together(groups.collect(), |worker| life(worker, &config));
    let on_hosts = together(local_group(2), |worker| life(worker, &config));
    for end in on_gpus {
        assert!(end == on_hosts[0], "{:?} {:?}", end.0, on_hosts[0].0);
    }
    assert!(on_hosts[0] == on_hosts[1]);
}
