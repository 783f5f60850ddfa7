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
	metadata string // its device, as /sys/block calls it
	pool     string
	times    map[string][]float64
	written  []float64 // KiB on the metadata device, each cycle
	flushes  []float64
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
		c.times = map[string][]float64{}
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
			c := all[(round+at)%2]
			w, f := c.io(t)
			key, name := fmt.Sprint("key", round), fmt.Sprint("name", round)
			whole := time.Now()
			c.timed("Prepare", func() error { return c.prepare(ctx, key, "base") }, t)
			c.timed("Commit", func() error { return c.sn.Commit(ctx, name, key) }, t)
			c.timed("Remove", func() error { return c.sn.Remove(ctx, name) }, t)
			c.timed("Cleanup", func() error {
				if cleaner, ok := c.sn.(snapshots.Cleaner); ok {
					return cleaner.Cleanup(ctx)
				}
				return nil
			}, t)
			c.times["cycle"] = append(c.times["cycle"], time.Since(whole).Seconds()*1000)
			w2, f2 := c.io(t)
			c.written = append(c.written, float64(w2-w)/2)
			c.flushes = append(c.flushes, float64(f2-f))
		}
	}
	fmt.Printf("| %d rounds, medians | devmapper | speedy | ratio |\n|---|---:|---:|---:|\n", rounds)
	for _, op := range []string{"Prepare", "Commit", "Remove", "Cleanup", "cycle"} {
		row(op+", ms", all, func(c *contender) []float64 { return c.times[op] })
	}
	row("KiB written to the metadata device, a cycle", all, func(c *contender) []float64 { return c.written })
	row("flushes of the metadata device, a cycle", all, func(c *contender) []float64 { return c.flushes })
	for at, c := range all {
		fmt.Printf("blocks of 64 KiB for %d snapshots of one image, %s: %d\n", kept, c.name, c.used(t)-before[at])
	}
}

func (c *contender) prepare(ctx context.Context, key, parent string) error {
	_, err := c.sn.Prepare(ctx, key, parent)
	return err
}

func (c *contender) timed(op string, run func() error, t *testing.T) {
	began := time.Now()
	must(t, run())
	c.times[op] = append(c.times[op], time.Since(began).Seconds()*1000)
}

// io returns the sectors written to the metadata device and its flushes.
func (c *contender) io(t *testing.T) (uint64, uint64) {
	text, err := os.ReadFile("/sys/block/" + c.metadata + "/stat")
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
	return &contender{name: "devmapper", sn: sn, metadata: filepath.Base(metadata), pool: "bench"}
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
	return &contender{name: "speedy", sn: s.snapshotter(), metadata: filepath.Base(metadata), pool: filepath.Base(pools[0])}
}
