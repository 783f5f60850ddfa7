package conformance

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/snapshots/devmapper"
)

// contender is one snapshotter on a pool of its own.
type contender struct {
	name     string
	sn       snapshots.Snapshotter
	pid      int    // who asks the kernel, with children
	metadata string // its device, as /sys/block calls it
	data     string
	pool     string
	times    map[string][]float64
	written  map[string][]float64 // KiB on both devices
	flushes  map[string][]float64 // of the metadata device
	ioctls   map[string][]float64 // of device-mapper
	trace    string               // what strace writes, while it does
}

// TestThinBench compares thin volumes with containerd's devmapper snapshotter:
// both in turn, on pools of the same shape in the same machine. contrib/bench
// thin runs it in a virtual machine, whose times are an emulated processor's:
// what is written and flushed is said as well.
func TestThinBench(t *testing.T) {
	rounds, err := strconv.Atoi(os.Getenv("TEST_THIN_BENCH"))
	if err != nil {
		t.Skip("SKIPPED, NOT PASSED: this is a benchmark (TEST_THIN_BENCH=ROUNDS) and needs device-mapper")
	}
	needRoot(t)
	ctx := namespaces.WithNamespace(context.Background(), "bench")
	dir := t.TempDir()
	all := []*contender{builtinThin(ctx, t, dir), ours(t, dir)}
	for _, c := range all {
		c.times, c.written = map[string][]float64{}, map[string][]float64{}
		c.flushes, c.ioctls = map[string][]float64{}, map[string][]float64{}
		must(t, c.prepare(ctx, "base-active", ""))
		must(t, c.sn.Commit(ctx, "base", "base-active"))
	}
	time.Sleep(3 * time.Second) // what is done behind a commit
	before := []uint64{all[0].used(t), all[1].used(t)}
	const kept = 8
	for n := range kept {
		for _, c := range all {
			must(t, c.prepare(ctx, fmt.Sprint("kept", n), "base"))
		}
	}
	for round := range rounds {
		for at := range all {
			all[(round+at)%2].cycle(ctx, t, fmt.Sprint(round))
		}
	}
	// strace takes time of its own, so what it counts is not timed.
	for _, c := range all {
		c.countIoctls(ctx, t, rounds)
	}
	fmt.Printf("| %d rounds, medians | devmapper | speedy | ratio |\n|---|---:|---:|---:|\n", rounds)
	for _, op := range operations {
		row(op+", ms", all, func(c *contender) []float64 { return c.times[op] })
	}
	for _, op := range operations {
		row("ioctls of device-mapper, "+op, all, func(c *contender) []float64 { return c.ioctls[op] })
	}
	for _, op := range operations {
		row("KiB written to metadata and data, "+op, all, func(c *contender) []float64 { return c.written[op] })
	}
	for _, op := range operations {
		row("flushes of the metadata device, "+op, all, func(c *contender) []float64 { return c.flushes[op] })
	}
	for at, c := range all {
		fmt.Printf("blocks of 64 KiB for %d snapshots of one image, %s: %d\n", kept, c.name, c.used(t)-before[at])
	}
}

const whole = "all four"

var operations = []string{"Prepare", "Commit", "Remove", "Cleanup", whole}

// cycle makes, commits and removes a snapshot of base.
func (c *contender) cycle(ctx context.Context, t *testing.T, n string) {
	c.measured(t, whole, func() error {
		c.measured(t, "Prepare", func() error { return c.prepare(ctx, "key"+n, "base") })
		c.measured(t, "Commit", func() error { return c.sn.Commit(ctx, "name"+n, "key"+n) })
		c.measured(t, "Remove", func() error { return c.sn.Remove(ctx, "name"+n) })
		c.measured(t, "Cleanup", func() error {
			if cleaner, ok := c.sn.(snapshots.Cleaner); ok {
				return cleaner.Cleanup(ctx)
			}
			return nil
		})
		return nil
	})
}

// countIoctls makes cycles with strace beside them.
func (c *contender) countIoctls(ctx context.Context, t *testing.T, rounds int) {
	c.trace = filepath.Join(t.TempDir(), "trace")
	strace := exec.Command("strace", "-f", "-q", "-e", "trace=ioctl", "-e", "signal=none", "-o", c.trace, "-p", strconv.Itoa(c.pid))
	strace.Stderr = os.Stderr
	must(t, strace.Start())
	time.Sleep(2 * time.Second) // it takes hold of all threads
	for round := range rounds {
		c.cycle(ctx, t, fmt.Sprint("counted", round))
	}
	must(t, strace.Process.Signal(os.Interrupt))
	_ = strace.Wait() // ends by the signal
	c.trace = ""
}

func (c *contender) prepare(ctx context.Context, key, parent string) error {
	_, err := c.sn.Prepare(ctx, key, parent)
	return err
}

func (c *contender) measured(t *testing.T, op string, run func() error) {
	if c.trace != "" {
		asked := c.asked(t)
		must(t, run())
		c.ioctls[op] = append(c.ioctls[op], float64(c.asked(t)-asked))
		return
	}
	written, flushes := c.io(t)
	began := time.Now()
	must(t, run())
	c.times[op] = append(c.times[op], time.Since(began).Seconds()*1000)
	written2, flushes2 := c.io(t)
	c.written[op] = append(c.written[op], float64(written2-written)/2)
	c.flushes[op] = append(c.flushes[op], float64(flushes2-flushes))
}

// asked returns how many ioctls of device-mapper strace has seen.
func (c *contender) asked(t *testing.T) int {
	text, err := os.ReadFile(c.trace)
	must(t, err)
	return strings.Count(string(text), ", DM_")
}

// io returns the sectors written to both devices and the flushes of the
// metadata device.
func (c *contender) io(t *testing.T) (uint64, uint64) {
	written, flushes := diskStat(t, c.metadata)
	data, _ := diskStat(t, c.data)
	return written + data, flushes
}

func diskStat(t *testing.T, device string) (uint64, uint64) {
	text, err := os.ReadFile("/sys/block/" + device + "/stat")
	must(t, err)
	fields := strings.Fields(string(text))
	written, err := strconv.ParseUint(fields[6], 10, 64)
	must(t, err)
	flushes, err := strconv.ParseUint(fields[15], 10, 64)
	must(t, err)
	return written, flushes
}

// used returns the data blocks in use of the pool.
func (c *contender) used(t *testing.T) uint64 {
	out, err := exec.Command("dmsetup", "status", c.pool).Output()
	must(t, err)
	used, _, _ := strings.Cut(strings.Fields(string(out))[5], "/")
	number, err := strconv.ParseUint(used, 10, 64)
	must(t, err)
	return number
}

func row(title string, all []*contender, of func(*contender) []float64) {
	a, b := median(of(all[0])), median(of(all[1]))
	ratio := "–" // there is none to nothing
	if a >= 0.05 {
		ratio = fmt.Sprintf("**%.2f**", b/a)
	}
	fmt.Printf("| %s | %.1f | %.1f | %s |\n", title, a, b, ratio)
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}

// device makes a file a block device.
func device(t *testing.T, path string, bytes int64) string {
	file, err := os.Create(path)
	must(t, err)
	must(t, file.Truncate(bytes))
	must(t, file.Close())
	free, err := exec.Command("losetup", "-f").Output()
	must(t, err)
	name := strings.TrimSpace(string(free))
	must(t, exec.Command("losetup", name, path).Run())
	t.Cleanup(func() { _ = exec.Command("losetup", "-d", name).Run() })
	return name
}

func builtinThin(ctx context.Context, t *testing.T, dir string) *contender {
	metadata, data := device(t, filepath.Join(dir, "m1"), 16<<20), device(t, filepath.Join(dir, "d1"), 1<<30)
	table := fmt.Sprintf("0 %d thin-pool %s %s 128 0", 1<<21, metadata, data)
	must(t, exec.Command("dmsetup", "create", "bench", "--table", table).Run())
	sn, err := devmapper.NewSnapshotter(ctx, &devmapper.Config{
		RootPath: filepath.Join(dir, "devmapper"), PoolName: "bench", BaseImageSize: "64MB",
	})
	must(t, err)
	return &contender{name: "devmapper", sn: sn, pid: os.Getpid(), metadata: filepath.Base(metadata), data: filepath.Base(data), pool: "bench"}
}

func ours(t *testing.T, dir string) *contender {
	metadata, data := device(t, filepath.Join(dir, "m2"), 16<<20), device(t, filepath.Join(dir, "d2"), 1<<30)
	s := serve(t, withEnv("SPEEDY_DRIVER=thin", "SPEEDY_THIN_SIZE=64MiB", "SPEEDY_POOL_MODE=direct",
		"SPEEDY_POOL_METADATA="+metadata, "SPEEDY_POOL_DATA="+data, "SPEEDY_THIN_DISCARD=false"))
	pools, err := filepath.Glob("/dev/mapper/speedy-*-pool")
	must(t, err)
	if len(pools) != 1 {
		t.Fatalf("pools: %v", pools)
	}
	return &contender{
		name: "speedy", sn: s.snapshotter(), pid: s.cmd.Process.Pid,
		metadata: filepath.Base(metadata), data: filepath.Base(data), pool: filepath.Base(pools[0]),
	}
}
